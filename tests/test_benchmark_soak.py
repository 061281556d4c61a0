"""The benchmark of kills: a few of them, of one process and of two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_runs_that_were_killed_end_as_undisturbed_ones() -> None:
    words = ["--kills", "3", "--only", "0", "--only", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["one process", "two, ZeRO 1"]
    for row in rows:
        kills, compared, differing = int(row[2].split()[0]), int(row[5].replace(",", "")), int(row[6])
        assert kills >= 1
        assert compared > 20
        assert differing == 0
