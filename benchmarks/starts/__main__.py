"""Trains what is missing of the plan and writes the table and its pictures: `python -m benchmarks.starts --out DIR`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.starts import results
from benchmarks.starts.conversions import Conversions
from benchmarks.starts.pictures import write_pictures
from benchmarks.starts.plan import plan
from benchmarks.starts.setting import Setting, Sizes
from benchmarks.starts.table import write_tables
from benchmarks.starts.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("starts"), help="where results, table and pictures go")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--table", action="store_true", help="train nothing; write what there is again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = results.read(arguments.out)
    if not arguments.table:
        with tempfile.TemporaryDirectory() as scratch:
            run(arguments.out, done, Path(scratch), Sizes())
    write_tables(arguments.out, done)
    write_pictures(arguments.out, done)


def run(out: Path, done: dict[str, results.Result], scratch: Path, sizes: Sizes) -> None:
    """Do every training of the plan that is not in `done`, and keep each as soon as it has ended."""
    setting = Setting(scratch, sizes)
    conversions = Conversions(setting)
    for training in plan(done):
        if training.key in done:
            continue
        started = time.monotonic()
        result = train(training, setting, conversions)
        done[training.key] = result
        results.append(out, result)
        took = time.monotonic() - started
        print(
            f"{len(done):4} {training.key}: gain {result.gain:.4f}, forgot {result.forgetting:.4f}, {took:.0f} s",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
