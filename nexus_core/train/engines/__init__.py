"""Engines: where model, gradients and optimizer of a training run are.

plain: whole, in every process. zero: in parts on all processes, by DeepSpeed.
"""

from __future__ import annotations

import torch
from torch import nn

from nexus_core.plugins import Family
from nexus_core.processes import World
from nexus_core.recipe.schema import DeepSpeed
from nexus_core.recipe.training import Train
from nexus_core.train.engines.engine import Engine
from nexus_core.train.engines.plain import PlainEngine
from nexus_core.train.setup import Trainables

__all__ = ["Engine", "is_cut", "new_engine"]


def is_cut(settings: DeepSpeed | None, here: World) -> bool:
    """Whether DeepSpeed is needed: at stage 0 nothing is in parts, and alone nothing but what is offloaded."""
    if settings is None or settings.zero_stage == 0:
        return False
    return not here.alone or settings.offload != "none"


def new_engine(
    model: nn.Module,
    family: Family,
    trainables: Trainables,
    train: Train,
    settings: DeepSpeed | None,
    here: World,
    device: torch.device,
) -> Engine:
    """The engine that a recipe's `run.deepspeed` asks for; trainables: of the model, ready. device: to compute on."""
    if settings is None or not is_cut(settings, here):
        return PlainEngine(model, trainables, weight_decay=train.weight_decay)
    from nexus_core.train.engines.zero import ZeroEngine

    return ZeroEngine(model, family, trainables, train, settings, here, device)
