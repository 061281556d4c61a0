"""Arithmetic on whole experts."""

from __future__ import annotations

from dataclasses import fields

import torch

from nexus_core.errors import UsageError
from nexus_core.types import ExpertWeights


def tensors(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """The tensors an expert has, by field name."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: value for name, value in values.items() if value is not None}


def own_float32(weights: ExpertWeights) -> ExpertWeights:
    """The expert in float32, in memory of its own."""
    return ExpertWeights(**{name: value.to(torch.float32, copy=True) for name, value in tensors(weights).items()})


def refuse_other_width(merge: str, width: int, weights: ExpertWeights) -> None:
    """Raise UsageError if a merge that keeps neurons as they are is asked for another width than the experts'."""
    if width != weights.width:
        raise UsageError(
            f"width is {width}, but merge '{merge}' gives a shared expert as wide as the model's own experts, "
            f"{weights.width} neurons; leave width out"
        )
