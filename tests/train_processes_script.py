"""Training runs for tests over several processes: `python train_processes_script.py MODEL FOLDER CASES`, launched.

CASES is JSON, a list of cases as `run` takes them; what comes of each lies in FOLDER/NAME. Tests call `run` too, alone.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training_runs import VOCABULARY, RandomBatches, train_settings

import nexus_core
from nexus_core import processes
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.cli.launch import die_with_launcher, end_process
from nexus_core.data.mixture import Batch
from nexus_core.data.packing import PackedSequences
from nexus_core.distill.signals import ROUTER_LOGITS, Signals
from nexus_core.recipe.schema import DeepSpeed
from nexus_core.stages.train import training_objective
from nexus_core.train.evaluation import HeldOut
from nexus_core.train.loop import fit
from nexus_core.train.setup import Loss, Objective
from nexus_core.types import Strategy

ADDITIONS = "additions.safetensors"


class Stopped(Exception):
    pass


class Batches(RandomBatches):
    """Ends the run where batch number `end` is asked for: with an error, or all of a sudden."""

    def __init__(self, batch_size: int, end: int | None, is_killed: bool):
        super().__init__(batch_size)
        self.end, self.is_killed, self.newest = end, is_killed, -1

    def batch(self, index: int) -> Batch:
        self.newest = index
        if index == self.end and self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.end:
            raise Stopped
        return super().batch(index)


def held_out_text() -> HeldOut:
    """Two sets of random text; five rows are three batches, an odd number."""
    generator = torch.Generator().manual_seed(3)
    sets = {}
    for name in ("domain", "general"):
        tokens = torch.randint(0, VOCABULARY, (5, 25), generator=generator)
        positions = torch.arange(24).expand(5, -1)
        sets[name] = PackedSequences(tokens[:, :-1], tokens[:, 1:].contiguous(), positions, torch.full((5,), 24))
    return HeldOut(sets, 2, ["domain"], 4.0)


def spoiling(batches: Batches, accumulation: int) -> Loss:
    """A loss of zero, but in the last process not a number in step 2, and with an infinite gradient in step 3."""
    here = processes.world()

    def spoil(signals: Signals, parameters: None = None) -> torch.Tensor:
        logits = signals.router_logits[-1]
        step = batches.newest // accumulation + 1
        if here.rank == here.size - 1 and step == 3 and logits.requires_grad:
            logits.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        is_spoilt = here.rank == here.size - 1 and step == 2
        return 0.0 * logits.sum() + (math.nan if is_spoilt else 0.0)

    return Loss(Strategy("spoil", spoil, "", needs=frozenset({ROUTER_LOGITS})), 1.0)


def run(checkpoint: Checkpoint, folder: Path, case: dict[str, Any]) -> None:
    """Train as a case says, in folder/NAME: `settings` changes `train_settings`, `deepspeed` is a recipe's section,
    `ends` a batch before which the run ends, `is_killed` how it does, `spoilt` puts steps in that are not finite.
    """
    settings = train_settings(**case.get("settings", {}))
    batches = Batches(settings.batch_size, case.get("ends"), case.get("is_killed", False))
    objective = training_objective(settings)
    if case.get("spoilt"):
        losses = (*objective.losses, spoiling(batches, settings.gradient_accumulation))
        objective = Objective(losses, objective.routing, objective.routing_parameters)
    model = nexus_core.load(checkpoint, dtype=getattr(torch, case.get("dtype", "float32")))
    deepspeed = case.get("deepspeed")
    out = folder / case["name"]
    try:
        trained = fit(
            model,
            checkpoint.family,
            batches,
            settings,
            objective,
            ["domain"],
            out,
            held_out=held_out_text() if settings.evaluate.every else None,
            deepspeed=DeepSpeed.model_validate(deepspeed) if deepspeed else None,
        )
    except Stopped:
        return
    if processes.world().is_first:
        save_file({name: tensor.contiguous() for name, tensor in trained.additions.items()}, out / ADDITIONS)


def main(model: str, folder: str, cases: str) -> None:
    die_with_launcher()
    torch.set_num_threads(1)
    processes.join()
    checkpoint = open_checkpoint(model)
    for case in json.loads(cases):
        run(checkpoint, Path(folder), case)
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
