"""Begins a run with what an earlier one had learnt."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from nexus_core.errors import CheckpointError
from nexus_core.plugins import Family
from nexus_core.train.trained_model import SHARD_NAME


def start_shard(folder: str | Path) -> Path:
    """The file of additions in an earlier run's folder, in the model in it, or in a converted model.

    Raises CheckpointError if there is none.
    """
    place = Path(folder).expanduser()
    for candidate in (place / "model" / SHARD_NAME, place / SHARD_NAME):
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"train.start_from: {folder} has no {SHARD_NAME}; give the folder of an earlier run's train, such as "
        "runs/latest/RECIPE/train, or the model in it"
    )


@torch.no_grad()
def start_from(model: nn.Module, family: Family, shard: Path) -> None:
    """Copy an earlier run's additions into the model, its routers' changes too if it had any.

    Raises CheckpointError if they do not fit the model.
    """
    config = json.loads((shard.parent / "config.json").read_text())
    if config.get("has_router_delta"):
        family.hook.nexus_attach_router_delta(model=model)
    with safe_open(shard, framework="pt") as file:
        known = set(file.keys())
        for name, parameter in family.hook.nexus_trainable_parameters(model=model).items():
            if name not in known:
                raise CheckpointError(f"train.start_from: {shard} has no tensor '{name}', which this model has")
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"train.start_from: {shard} has '{name}' as {list(tensor.shape)}, this model as "
                    f"{list(parameter.shape)}; start from a run of the same base and convert.width"
                )
            parameter.copy_(tensor)
