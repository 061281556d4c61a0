"""How the cost of collecting and of training grows with layers, experts and tokens, on random models of a small width,
and that of training with processes, on the demo.

Processor time, so that other work on the machine counts for little. Draws `scaling.png` beside the JSON.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nexus_gpt_oss import synthetic

from benchmarks.measurement import Measurement
from benchmarks.process_costs import StepCost, costs
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.pipeline.rehearsal import Rehearsal, random_sequences
from nexus_core.plugins import installed
from nexus_core.report.scaling import scaling_picture

PICTURE = Path("scaling.png")
LENGTH = 128
WIDTH = 256

# What grows, by which sizes, while the others stay as in the first of these.
USUAL = {"layers": 4, "experts": 32, "tokens": 1024}
GROWS = {"layers": (2, 4, 8, 16), "experts": (8, 32, 128), "tokens": (256, 1024, 4096)}
LABELS = {"layers": "layers", "experts": "experts per layer", "tokens": "tokens per batch"}


@dataclass(frozen=True)
class Cost:
    """Processor seconds of one batch."""

    collect: float
    train: float


def run() -> list[Measurement]:
    """Ratios to the same at the usual sizes."""
    found: list[Measurement] = []
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    usual = cost(**USUAL)
    for what, sizes in GROWS.items():
        curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for size in sizes:
            chosen = USUAL | {what: size}
            spent = usual if chosen == USUAL else cost(**chosen)
            for stage, seconds in vars(spent).items():
                curves[stage].append((size, seconds))
                found.append(
                    Measurement(
                        f"cost of a batch as {LABELS[what]} grow, random models of width {WIDTH}",
                        f"{stage}, {size:,} {what}",
                        seconds,
                        seconds / getattr(usual, stage),
                        f"{USUAL[what]:,} {what}",
                        f"{1e6 * seconds / chosen['tokens']:,.0f} us a token",
                    )
                )
        panels[LABELS[what]] = dict(curves)
    shared = costs()
    panels["processes"] = {"train": [(n, each.processor_seconds) for (n, stage), each in shared.items() if not stage]}
    found += by_processes(shared)
    scaling_picture(panels, "processor seconds per batch").savefig(PICTURE, dpi=130)
    return found


def by_processes(costs: Mapping[tuple[int, int | None], StepCost]) -> list[Measurement]:
    """Ratios to one process alone."""
    alone = costs[1, None]
    return [
        Measurement(
            "a step of the demo, 2,048 tokens, by processes: processor seconds of all of them",
            f"{processes} process{'es' if processes > 1 else ''}" + (f", ZeRO {stage}" if stage else ""),
            each.processor_seconds,
            each.processor_seconds / alone.processor_seconds,
            "one process",
            f"{each.seconds:.2f} s by the clock; {each.peak_bytes / 1e6:,.0f} MB resident each",
        )
        for (processes, stage), each in costs.items()
    ]


def cost(layers: int, experts: int, tokens: int) -> Cost:
    """Of a random model with these sizes."""
    config = synthetic.config("tiny", layers) | {
        "num_local_experts": experts,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
    }
    model: Any = synthetic.build_of(config, dtype=torch.float32)
    checkpoint = Checkpoint("random", Path(), config, installed().family(config, "random"))
    batch, steps = tokens // LENGTH, 2
    packed = random_sequences(config["vocab_size"], batch * (steps + 1), LENGTH)
    rehearsal = Rehearsal(checkpoint, model, packed, batch, steps, clock=time.process_time)
    return Cost(rehearsal.collect(keep_inputs=0).seconds, rehearsal.train(recomputes=False).seconds)
