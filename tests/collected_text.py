"""Two small data sets to collect over."""

from __future__ import annotations

from pathlib import Path

from prompt_files import write_records

from nexus_core.recipe.schema import Source


def write_sets(folder: Path) -> dict[str, list[Source]]:
    """60 records each of `domain` and `general`, of uneven lengths."""
    sets = {}
    for name in ("domain", "general"):
        records = [{"text": f"{name} text number {number}, " * (1 + number % 4)} for number in range(60)]
        sets[name] = [Source(path=write_records(folder / f"{name}.jsonl", records))]
    return sets
