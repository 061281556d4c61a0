"""Runs the benchmarks and prints one table, JSON beside it: `python -m benchmarks [NAME ...] [--out FILE]`."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import Measurement

BENCHMARKS = (
    "decode",
    "packed_experts",
    "attention",
    "loading",
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
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(arguments.threads)

    report: dict[str, Any] = {"machine": machine(), "seconds": {}, "failed": {}, "measurements": []}
    for name in arguments.names or BENCHMARKS:
        began = time.perf_counter()
        try:
            found = importlib.import_module(f"benchmarks.{name}").run()
        except Exception as error:  # the others' results are wanted all the same
            report["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"\n{name}  failed: {report['failed'][name]}", flush=True)
            found = []
        report["seconds"][name] = time.perf_counter() - began
        report["measurements"] += [asdict(measurement) for measurement in found]
        print("\n".join(rows(found)), flush=True)
        # After each, so that a run that is cut short has what it had.
        arguments.out.write_text(json.dumps(report, indent=1))
    print(f"\n{machine()}\n{sum(report['seconds'].values()):,.0f} s; written to {arguments.out}")
    sys.exit(1 if report["failed"] else 0)


def rows(measurements: Iterable[Measurement]) -> list[str]:
    """A heading and one line a subject."""
    lines: list[str] = []
    for measurement in measurements:
        if not lines:
            lines += ["", f"{measurement.benchmark}  (ratios to {measurement.against})"]
        spent = f"{1000 * measurement.seconds:>10.2f} ms {measurement.ratio:>8.2f} x"
        lines.append(f"  {measurement.subject:<44} {spent}  {measurement.note}")
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
