"""Steps of a long benchmark one after the other, each saved as it is done, until the time is up."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import machine
from nexus_core.errors import is_out_of_memory


@dataclass
class Journey:
    """Steps one after the other, each in the report when it is done, until the time is up."""

    device: str
    out: Path
    time_limit: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.time_limit - (time.monotonic() - self.began)

    def step(self, name: str, run: Callable[[], dict[str, Any]], *, least_seconds: float = 5.0) -> dict[str, Any]:
        """Run a step and save what it says; what goes wrong in it is its result, and the next one follows."""
        row: dict[str, Any] = {"step": name}
        started = time.monotonic()
        if self.left < least_seconds:
            row["not_reached"] = f"{max(self.left, 0):.0f} s were left"
        else:
            try:
                row |= run()
            except Exception as error:  # one step must not cost the others' results
                row["failed"] = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
        row["wall_seconds"] = time.monotonic() - started
        self.rows.append(row)
        print(line(row), flush=True)
        self.save()
        return row

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about(self.device), "steps": self.rows}
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1))
        partial.replace(self.out.with_suffix(".json"))
        self.out.with_suffix(".md").write_text(markdown(report))


def about(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {**machine(), "device": device, "command": " ".join(sys.argv)}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def line(row: dict[str, Any]) -> str:
    """One step as a person reads it while it goes."""
    told = ", ".join(f"{name} {_number(value)}" for name, value in row.items() if name not in ("step", "wall_seconds"))
    return f"{row['step']:<44} {told}"


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    about = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    rows = [f"| {row['step']} | {line({**row, 'step': ''}).strip()} |" for row in report["steps"]]
    return "\n".join(["# One GPU", "", about, "", "| step | result |", "|---|---|", *rows, ""])


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
