"""The most important expert alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nexus_core.merge.weights import own_float32, refuse_other_width
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, Strategy


def top1(
    read: Callable[[int], ExpertWeights],
    layer: LayerSelection,
    width: int,
    parameters: None,
    generator: torch.Generator,
) -> ExpertWeights:
    """The most important of the chosen experts, unchanged: W = W_e of the first expert that the selection lists."""
    merged = own_float32(read(layer.experts[0]))
    refuse_other_width("top1", width, merged)
    return merged


TOP1 = Strategy(name="top1", function=top1, summary="the most important expert, unchanged")
