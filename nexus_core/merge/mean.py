"""The average of the chosen experts."""

from __future__ import annotations

import torch

from nexus_core.merge.combine import combine, refuse_empty_blocks
from nexus_core.merge.experts import LayerExperts
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, Strategy


def mean(
    experts: LayerExperts, layer: LayerSelection, width: int, parameters: None, generator: torch.Generator
) -> ExpertWeights:
    """Every number the mean of the chosen experts' numbers at that place: W = (1 / k) * sum over the k experts of W_e.

    Neuron i of one expert is averaged with neuron i of the others, although nothing aligns them, so the merged expert
    computes something else than the average of their outputs. Biases are averaged too. Wider than an expert: several
    such averages side by side; other widths: its most salient neurons; see `combine`.
    Source: the first published scripts of this method, github.com/eous/nexus.
    """
    return combine(experts, dict.fromkeys(layer.experts, 1.0), width)


MEAN = Strategy(name="mean", function=mean, summary="the average of the chosen experts", refuses=refuse_empty_blocks)
