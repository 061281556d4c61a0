"""The average of the chosen experts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nexus_core.merge.weights import own_float32, refuse_other_width, tensors
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, Strategy


def mean(
    read: Callable[[int], ExpertWeights],
    layer: LayerSelection,
    width: int,
    parameters: None,
    generator: torch.Generator,
) -> ExpertWeights:
    """Every number the mean of the chosen experts' numbers at that place: W = (1 / k) * sum over the k experts of W_e.

    Neuron i of one expert is averaged with neuron i of the others, although nothing aligns them, so the merged expert
    computes something else than the average of their outputs. Summed in float32, in order of importance.
    Source: the first published scripts of this method, github.com/eous/nexus.
    """
    first, *others = layer.experts
    merged = own_float32(read(first))
    refuse_other_width("mean", width, merged)
    total = tensors(merged)
    for expert in others:
        for name, tensor in tensors(read(expert)).items():
            total[name].add_(tensor)
    for tensor in total.values():
        tensor.div_(len(layer.experts))
    return merged


MEAN = Strategy(name="mean", function=mean, summary="the average of the chosen experts")
