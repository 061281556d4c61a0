"""What a merged expert would do to its layer's output."""

# T tokens, D hidden size, F expert width, R neurons of a tile

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from nexus_core.errors import ShapeError
from nexus_core.merge.experts import NeuronActivations
from nexus_core.types import ExpertWeights

TILE_NEURONS = 512


@dataclass(frozen=True)
class Effect:
    """A shared expert's output beside the routed experts', over the same T inputs.

    relative_change: ||shared|| / ||routed||, Frobenius norms over all inputs. cosine: mean over the inputs of the
    cosine between the two outputs; 1 repeats what the layer does already, 0 is unrelated.
    """

    relative_change: float
    cosine: float


def expert_output(weights: ExpertWeights, hidden_TD: torch.Tensor, activations: NeuronActivations) -> torch.Tensor:
    """One expert's output (T, D): down @ activations(gate @ x + gate_bias, up @ x + up_bias) + down_bias.

    activations: the family's own, of gate and up (T, F) each. Computed in the type of hidden_TD, some neurons at a
    time, so that an expert stored in fewer bits is never held whole in more.
    """
    dtype = hidden_TD.dtype
    output_TD = hidden_TD.new_zeros(hidden_TD.shape)
    for start in range(0, weights.width, TILE_NEURONS):
        tile = slice(start, start + TILE_NEURONS)
        gate_TR, up_TR = (
            functional.linear(hidden_TD, matrix[tile].to(dtype), None if bias is None else bias[tile].to(dtype))
            for matrix, bias in ((weights.gate, weights.gate_bias), (weights.up, weights.up_bias))
        )
        output_TD += functional.linear(activations(gate_TR, up_TR), weights.down[:, tile].to(dtype))
    return output_TD if weights.down_bias is None else output_TD + weights.down_bias


def measure_effect(shared_TD: torch.Tensor, routed_TD: torch.Tensor) -> Effect:
    """How large a shared expert's output is beside the routed output, and how alike the two are.

    Raises ShapeError if they differ in shape or the routed output is zero everywhere.
    """
    if shared_TD.shape != routed_TD.shape:
        raise ShapeError(f"outputs {tuple(shared_TD.shape)} and {tuple(routed_TD.shape)} are not of the same inputs")
    routed_norm = torch.linalg.vector_norm(routed_TD.double())
    if routed_norm == 0:
        raise ShapeError("the routed experts' output is zero for all inputs; nothing can be compared with it")
    cosine_T = functional.cosine_similarity(shared_TD.double(), routed_TD.double(), dim=-1)
    return Effect(
        relative_change=float(torch.linalg.vector_norm(shared_TD.double()) / routed_norm),
        cosine=float(cosine_T.mean()),
    )
