"""Finished trainings, one line of JSON each, so that a killed run loses none."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.starts.subjects import Result

FILE_NAME = "trainings.jsonl"


def read(folder: Path) -> dict[str, Result]:
    """Results by key; a last line that was cut off is left out."""
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    results = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        results[record["key"]] = Result.of(record)
    return results


def append(folder: Path, result: Result) -> None:
    """Add one, on a line of its own whatever the line before looks like."""
    path = folder / FILE_NAME
    starts_a_line = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(("" if starts_a_line else "\n") + json.dumps(result.as_record()) + "\n")
