"""Steps of a long benchmark one after the other, each saved as it is done, until the time is up."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import machine
from nexus_core.errors import is_out_of_memory

ROOT = Path(__file__).parents[1]


@dataclass
class Journey:
    """Steps one after the other, each in the report when it is done, until the time is up."""

    device: str
    out: Path
    time_limit: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def going_on(cls, device: str, out: Path, time_limit: float) -> Journey:
        """After the steps that the report has by now."""
        report = out.with_suffix(".json")
        rows = json.loads(report.read_text())["steps"] if report.is_file() else []
        return cls(device, out, time_limit, rows)

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
            self.free_memory()
        row["wall_seconds"] = time.monotonic() - started
        return self.add(row)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Put a result into the report."""
        self.rows.append(row)
        print(line(row), flush=True)
        self.save()
        return row

    def free_memory(self) -> None:
        """Give back what no tensor holds."""
        gc.collect()
        if self.device.startswith("cuda"):
            # After some errors a GPU does nothing more for this process, and says so here.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about(self.device), "steps": self.rows}
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1))
        partial.replace(self.out.with_suffix(".json"))
        self.out.with_suffix(".md").write_text(markdown(report))


def run_tests(seconds: float, chosen: tuple[str, ...] = ("-m", "gpu", "tests")) -> dict[str, Any]:
    """The tests that need a GPU, as far as they come in so many seconds, and which of them failed."""
    # A module that needs a package that is not there must not keep the others' tests from running.
    command = [sys.executable, "-m", "pytest", "-vv", "--continue-on-collection-errors", *chosen]
    with tempfile.TemporaryFile("w+") as output:
        ended: dict[str, Any]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
            ended = {"exit_code": done.returncode}
        except subprocess.TimeoutExpired:
            ended = {"stopped_after": seconds}
        output.seek(0)
        said = output.read().strip().splitlines() or [""]
    results = [line.split(" ")[:2] for line in said if "::" in line]
    passed = sum(result[1:] == ["PASSED"] for result in results)
    failed = [name for name, *result in results if result in (["FAILED"], ["ERROR"])]
    return ended | {"passed": passed, "failed_tests": failed, "said": said[-1]}


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
