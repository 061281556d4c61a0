"""The average of the chosen experts after their neurons have been put in the same order.

# N kept inputs, D hidden size, F expert width, R rows of a tile
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.errors import UsageError
from nexus_core.merge.combine import combine, refuse_empty_blocks
from nexus_core.merge.experts import PROJECTIONS, LayerExperts, Projection, Rows
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, MergeRequest, Refusal, Strategy


class AlignedParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: Literal["weights", "activations"] = Field(
        "weights",
        description="What makes two neurons alike: their weights, or what they put out for the MoE inputs that "
        "`collect.keep_inputs` keeps.",
    )


def aligned(
    experts: LayerExperts,
    layer: LayerSelection,
    width: int,
    parameters: AlignedParameters,
    generator: torch.Generator,
) -> ExpertWeights:
    """The mean of the chosen experts, each with its neurons in the order that fits the most important one's best.

    An expert computes the same whatever order its neurons are in, so before averaging each is matched one to one
    with the first, by the assignment that maximises the summed likeness of the pairs (Hungarian method,
    scipy.optimize.linear_sum_assignment). Likeness by weights: the cosine of the neurons' vectors [gate row, up row,
    down column, both biases]; by activations: the cosine of what they put out over the layer's kept inputs. Everything
    else is as for `mean`; where blocks lie side by side, each is matched with the first of its own experts. One match
    takes about F^2 * 6D operations by weights, F^2 * 2N by activations, and the assignment up to F^3.
    Source of matching before averaging: Singh & Jaggi 2020, arXiv 1910.05653; Ainsworth et al. 2022, arXiv 2209.04836.
    """
    if parameters.match == "activations" and experts.inputs_ND is None:
        raise UsageError(
            "merge 'aligned' matches neurons by what they put out for the layers' kept inputs, and there are none; "
            "collect with keep_inputs above 0 and name that folder (--statistics), or set match to weights"
        )

    def match(blocks: Sequence[Sequence[int]]) -> Reordered:
        pairs = [(block[0], expert) for block in blocks for expert in block[1:]]
        return Reordered(
            experts, {expert: neuron_order(experts, first, expert, parameters.match) for first, expert in pairs}
        )

    return combine(experts, dict.fromkeys(layer.experts, 1.0), width, match)


def neuron_order(
    experts: LayerExperts, reference: int, expert: int, match: Literal["weights", "activations"]
) -> torch.Tensor:
    """For each neuron of the reference expert the neuron of the other that is its match, (F,) int64."""
    from scipy.optimize import linear_sum_assignment

    likeness = _by_weights if match == "weights" else _by_activations
    # Negated rather than `maximize=True`, and float64 already: scipy would make a copy for each.
    cost_FF = likeness(experts, reference, expert).neg_().double().numpy()
    return torch.from_numpy(linear_sum_assignment(cost_FF)[1])


def _by_weights(experts: LayerExperts, reference: int, expert: int) -> torch.Tensor:
    """Cosine of every two neurons' weights and biases, (F, F) float32: the reference's in rows."""
    product_FF = torch.zeros(experts.width, experts.width)
    squares = [torch.zeros(experts.width), torch.zeros(experts.width)]
    for projection in PROJECTIONS[:2]:
        theirs, their_bias = experts.matrix(expert, projection, torch.float32)
        squares[1] += torch.linalg.vector_norm(theirs, dim=1).square_()
        for tile in experts.tiles(projection):
            ours, our_bias = experts.rows(reference, projection, tile)
            product_FF[tile].addmm_(ours.float(), theirs.T)
            squares[0][tile] += ours.float().square().sum(dim=1)
            if our_bias is not None and their_bias is not None:
                product_FF[tile].addr_(our_bias.float(), their_bias)
                squares[0][tile] += our_bias.float().square()
        if their_bias is not None:
            squares[1] += their_bias.square()
    # Columns of down are neurons: its rows, tile by tile, are a few more of their numbers each.
    for tile in experts.tiles("down"):
        ours, theirs = (experts.rows(e, "down", tile)[0].float() for e in (reference, expert))
        product_FF.addmm_(ours.T, theirs)
        for square, matrix in zip(squares, (ours, theirs), strict=True):
            square += matrix.square().sum(dim=0)
    ours_F, theirs_F = (square.sqrt_().clamp_(min=torch.finfo(torch.float32).tiny) for square in squares)
    return product_FF.div_(ours_F[:, None]).div_(theirs_F)


def _by_activations(experts: LayerExperts, reference: int, expert: int) -> torch.Tensor:
    """Cosine of what every two neurons put out over the kept inputs, (F, F) float32: the reference's in rows."""
    assert experts.inputs_ND is not None
    outputs = [
        torch.nn.functional.normalize(experts.neuron_activations(e, experts.inputs_ND), dim=0)
        for e in (reference, expert)
    ]
    return outputs[0].T @ outputs[1]


class Reordered:
    """Experts as combine reads them, with the neurons of some of them in another order."""

    def __init__(self, experts: LayerExperts, orders: Mapping[int, torch.Tensor]):
        self._experts, self._orders = experts, orders

    def tiles(self, projection: Projection) -> Iterable[slice]:
        # The rows of gate and up come from all over the matrix, so it is read once and whole.
        return self._experts.tiles("down") if projection == "down" else [slice(0, self._experts.width)]

    def rows(self, expert: int, projection: Projection, rows: slice, dtype: torch.dtype) -> Rows:
        order_F = self._orders.get(expert)
        if projection == "down":
            matrix, bias = self._experts.rows(expert, projection, rows, dtype)
            return (matrix if order_F is None else matrix[:, order_F]), bias
        # As it is stored: a whole matrix in float32 would take twice the memory for a little time.
        return self._experts.matrix(expert, projection, order=order_F)


def refuse(request: MergeRequest, parameters: AlignedParameters) -> Refusal | None:
    """Where there is nothing to match by, or too few experts for the width."""
    if parameters.match == "activations" and request.kept_inputs == 0:
        return Refusal(
            "match",
            "is activations, those of MoE inputs that collect keeps, but collect.keep_inputs is 0; raise it, or write "
            "weights",
        )
    return refuse_empty_blocks(request)


ALIGNED = Strategy(
    name="aligned",
    function=aligned,
    summary="the average of the chosen experts, their neurons first matched to the most important expert's",
    parameters=AlignedParameters,
    refuses=refuse,
)
