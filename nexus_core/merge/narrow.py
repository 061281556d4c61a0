"""A merged expert cut down to its most salient neurons.

# N kept inputs, D hidden size, F width before, W width after
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nexus_core.merge.effect import TILE_NEURONS
from nexus_core.merge.experts import LayerExperts
from nexus_core.types import ExpertWeights


def keep_salient(experts: LayerExperts, merged: ExpertWeights, width: int) -> ExpertWeights:
    """The `width` neurons of a merged expert that do most, in the order they had; its output bias stays whole.

    See `neuron_importance`; ties go to the neuron that comes first.
    """
    importance_F = neuron_importance(experts, merged)
    kept = torch.argsort(importance_F, descending=True, stable=True)[:width].sort().values
    return ExpertWeights(
        gate=merged.gate[kept],
        up=merged.up[kept],
        down=merged.down[:, kept],
        gate_bias=None if merged.gate_bias is None else merged.gate_bias[kept],
        up_bias=None if merged.up_bias is None else merged.up_bias[kept],
        down_bias=merged.down_bias,
    )


def neuron_importance(experts: LayerExperts, weights: ExpertWeights) -> torch.Tensor:
    """How much each neuron puts out, (F,) float32: mean |activation| over the layer's kept inputs x norm of its column
    of down. Without kept inputs the norm of its rows of gate and up stands in for the activation.
    """
    parts = []
    for start in range(0, weights.width, TILE_NEURONS):
        tile = slice(start, start + TILE_NEURONS)
        gate, up = weights.gate[tile].float(), weights.up[tile].float()
        if experts.inputs_ND is None:
            size = (gate.square().sum(dim=1) + up.square().sum(dim=1)).sqrt()
        else:
            biases = [None if bias is None else bias[tile].float() for bias in (weights.gate_bias, weights.up_bias)]
            gate_NF = functional.linear(experts.inputs_ND, gate, biases[0])
            up_NF = functional.linear(experts.inputs_ND, up, biases[1])
            size = experts.activations(gate_NF, up_NF).abs().mean(dim=0)
        parts.append(size * torch.linalg.vector_norm(weights.down[:, tile].float(), dim=0))
    return torch.cat(parts)
