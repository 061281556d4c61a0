"""`python -m benchmarks`: every benchmark in a process of its own, one table, JSON beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Benchmarks are no part of what is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.__main__ import BENCHMARKS, measured, rows

ROOT = Path(__file__).parents[1]


def test_one_table_and_json_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks", "decode", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["failed"] == {}
    assert report["seconds"]["decode"] > 0
    subjects = [each["subject"] for each in report["measurements"]]
    assert "nexus, torch" in subjects
    assert all(subject in done.stdout for subject in subjects)


def test_a_benchmark_that_fails_says_so_and_stops_no_other() -> None:
    assert measured("nothing of that name")["failed"].startswith("ModuleNotFoundError")


def test_every_thing_measured_has_a_heading_of_its_own() -> None:
    def row(benchmark: str, subject: str) -> dict[str, object]:
        return {
            "benchmark": benchmark,
            "subject": subject,
            "seconds": 0.5,
            "ratio": 2.0,
            "against": "copy",
            "note": "",
        }

    found = rows([row("512 rows", "dense"), row("512 rows", "packed"), row("128 rows", "dense")])
    assert [line.strip() for line in found if line and not line.startswith("  ")] == [
        "512 rows  (ratios to copy)",
        "128 rows  (ratios to copy)",
    ]
    assert found[2].split() == ["dense", "500.00", "ms", "2.00", "x"]


def test_an_unknown_name_says_which_there_are() -> None:
    command = [sys.executable, "-m", "benchmarks", "decod"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"there is no benchmark 'decod'; there are {', '.join(BENCHMARKS)}" in done.stderr
