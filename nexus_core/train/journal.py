"""metrics.jsonl: one line of numbers per optimizer step, never two for the same step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

Row = dict[str, float]

# Of a run's steps, those at its end that its final numbers are means over.
LAST_SHARE = 0.1


class Journal:
    """A file of rows {"step": n, name: value, ...}, in order of steps; a row is on disk when `write` returns."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the row of a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rows(self) -> list[Row]:
        """All rows; a last line that was cut short is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def cut_after(self, step: int) -> None:
        """Forget the rows of later steps, which a resumed run is about to write again; -1 forgets all."""
        kept = [row for row in self.rows() if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.path)


def mean_of_last(rows: list[Row], name: str) -> float | None:
    """The mean of a value over the last tenth of the steps, at least one; None if no row has it."""
    values = [row[name] for row in rows if name in row and row["step"] > 0]
    last = values[-max(1, round(LAST_SHARE * len(values))) :]
    return sum(last) / len(last) if last else None
