"""What a training step of the demo costs all processes together, by how many there are and how they share: real runs.

Starting processes takes longer than their steps, so a short run is subtracted from a longer one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SHORT, LONG = 2, 10

# Processes and ZeRO stage; None is plain PyTorch, every process with the whole optimizer.
SHARING: tuple[tuple[int, int | None], ...] = ((1, None), (2, None), (4, None), (2, 1), (2, 2), (2, 3))


@dataclass(frozen=True)
class StepCost:
    """Of one step of 2,048 tokens. processor_seconds: of all processes. peak_bytes: resident, of the first process."""

    processor_seconds: float
    seconds: float
    peak_bytes: float


def costs() -> dict[tuple[int, int | None], StepCost]:
    """By processes and ZeRO stage; the same steps of the same recipe."""
    with tempfile.TemporaryDirectory() as store:
        _run(store, {}, until="convert")
        return {(processes, stage): _cost(store, processes, stage) for processes, stage in SHARING}


def _cost(store: str, processes: int, stage: int | None) -> StepCost:
    settings: dict[str, object] = {"run.processes": processes, "train.evaluate.every": "null"}
    if stage is not None:
        settings["run.deepspeed.zero_stage"] = stage
    spent = [_run(store, settings | {"train.max_steps": steps}) for steps in (SHORT, LONG)]
    steps = [json.loads(line) for line in (Path(store) / "latest/tiny/train/metrics.jsonl").read_text().splitlines()]
    # The first step also makes what the others use again.
    timed = [step for step in steps if step["step"] > 1]
    return StepCost(
        (spent[1] - spent[0]) / (LONG - SHORT),
        statistics.median(step["seconds"] for step in timed),
        1e9 * max(step["peak_memory_gb"] for step in timed),
    )


def _run(store: str, settings: Mapping[str, object], until: str = "train") -> float:
    """Processor seconds of a run and all it started."""
    given = {"run.store": store, "run.tracking.enabled": "false", **settings}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    before = _children_seconds()
    done = subprocess.run(
        # What another number of processes has trained would be taken as done.
        [sys.executable, "-m", "nexus_core", "run", str(RECIPE), "--until", until, "--rerun", until, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"nexus run ended with {done.returncode}: {done.stderr[-500:]}")
    return _children_seconds() - before


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system
