"""The most important expert alone."""

from __future__ import annotations

import torch

from nexus_core.merge.combine import combine, refuse_empty_blocks
from nexus_core.merge.experts import LayerExperts
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, Strategy


def top1(
    experts: LayerExperts, layer: LayerSelection, width: int, parameters: None, generator: torch.Generator
) -> ExpertWeights:
    """The most important of the chosen experts, unchanged: W = W_e of the first expert that the selection lists.

    Its biases are kept. Wider than an expert: the first m side by side, down and its bias divided by m, so that they
    give the average of the m outputs; narrower: its most salient neurons, see `keep_salient`.
    """
    blocks = -(-width // experts.width)
    return combine(experts, dict.fromkeys(layer.experts[:blocks], 1.0), width)


TOP1 = Strategy(name="top1", function=top1, summary="the most important expert, unchanged", refuses=refuse_empty_blocks)
