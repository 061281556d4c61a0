"""Prompts and records in files, for tests of what a model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_questions(folder: Path, count: int = 10) -> str:
    return write_records(
        folder / "prompts.jsonl", [{"prompt": f"What is {number}" + "?" * number} for number in range(count)]
    )


def read_records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
