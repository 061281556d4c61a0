"""Runs the benchmarks and prints one table, JSON beside it: `python -m benchmarks [NAME ...] [--out FILE]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = (
    "decode",
    "packed_experts",
    "attention",
    "layers",
    "statistics",
    "collecting",
    "sampling",
    "conversion",
    "vocabulary_loss",
    "stored_teacher",
    "side_by_side",
    "scaling",
    "preflight",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all if left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="where the JSON goes")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, BLAS and OpenMP")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(arguments.threads)
    if arguments.part:
        arguments.out.write_text(json.dumps(measured(arguments.names[0])))
        return
    report: dict[str, Any] = {"machine": machine(), "seconds": {}, "failed": {}, "measurements": []}
    for name in arguments.names or BENCHMARKS:
        began = time.perf_counter()
        result = in_own_process(name, arguments.threads)
        if "failed" in result:
            report["failed"][name] = result["failed"]
            print(f"\n{name}  failed: {result['failed']}", flush=True)
        report["seconds"][name] = time.perf_counter() - began
        report["measurements"] += result["measurements"]
        print("\n".join(rows(result["measurements"])), flush=True)
        # After each, so that a run that is cut short has what it had.
        arguments.out.write_text(json.dumps(report, indent=1))
    print(f"\n{machine()}\n{sum(report['seconds'].values()):,.0f} s; written to {arguments.out}")
    sys.exit(1 if report["failed"] else 0)


def in_own_process(name: str, threads: int) -> dict[str, Any]:
    """What a benchmark measured: memory that others had freed and the allocator kept would hide what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        words = [name, "--part", "--threads", str(threads), "--out", str(out)]
        # What is compared with has its threads from BLAS and OpenMP.
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        command = [sys.executable, "-m", "benchmarks", *words]
        ended = subprocess.run(command, env=environment, check=False).returncode
        if not out.is_file():
            return {"failed": f"its process ended with {ended}", "measurements": []}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def measured(name: str) -> dict[str, Any]:
    """Measurements as plain data; with `failed` instead of an error, because the others' results are wanted too."""
    try:
        found = importlib.import_module(f"benchmarks.{name}").run()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}", "measurements": []}
    return {"measurements": [asdict(measurement) for measurement in found]}


def rows(measurements: Iterable[Mapping[str, Any]]) -> list[str]:
    """A heading for each thing measured, and one line a subject."""
    lines: list[str] = []
    heading = None
    for measurement in measurements:
        if measurement["benchmark"] != heading:
            heading = measurement["benchmark"]
            lines += ["", f"{heading}  (ratios to {measurement['against']})"]
        spent = f"{1000 * measurement['seconds']:>10.2f} ms {measurement['ratio']:>8.2f} x"
        lines.append(f"  {measurement['subject']:<44} {spent}  {measurement['note']}".rstrip())
    return lines


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    import transformers

    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
