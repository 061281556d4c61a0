"""Weighted averages of experts, in as many blocks as the wanted width takes, tile by tile.

# D hidden size, F expert width, W width of the shared expert, R rows of a tile
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch

from nexus_core.merge.experts import PROJECTIONS, LayerExperts, Projection, Rows
from nexus_core.merge.narrow import keep_salient
from nexus_core.types import ExpertWeights, MergeRequest, Refusal


class RowSource(Protocol):
    """Where the numbers to average come from: a layer's experts as they lie there, or with neurons in another order."""

    def tiles(self, projection: Projection) -> Iterable[slice]: ...

    def rows(self, expert: int, projection: Projection, rows: slice, dtype: torch.dtype) -> Rows:
        """dtype: wanted, for speed only."""


def combine(
    experts: LayerExperts,
    weights: Mapping[int, float],
    width: int,
    match: Callable[[Sequence[Sequence[int]]], RowSource] | None = None,
) -> ExpertWeights:
    """Experts averaged with these weights, by index and most important first, as one expert of `width` neurons.

    Up to F neurons it is one average; beyond, as many blocks of F as `width` needs lie side by side. The experts are
    dealt out among them by rank (block b of m gets those ranked b, b + m, b + 2m, ...). Gate and up of a block are the
    average of its experts; down and its bias are that too, times the block's share of all weights. So the output stays
    the size of one expert's, and with a block per expert it is exactly the weighted average of their outputs. If the
    blocks have more neurons than wanted, the most salient are kept, see `keep_salient`.

    Summed in float32 and rounded once. match: given the blocks, what to read instead of the experts as they
    are.
    """
    blocks = deal(list(weights), -(-width // experts.width))
    source: RowSource = match(blocks) if match else experts
    merged = experts.blank(len(blocks) * experts.width)
    output_bias_D = torch.zeros(experts.hidden_size)
    place = partial(_place, merged, output_bias_D)
    everything = sum(weights.values())
    for number, block in enumerate(blocks):
        neurons = slice(number * experts.width, (number + 1) * experts.width)
        shares = {expert: weights[expert] for expert in block}
        for projection in PROJECTIONS:
            total = everything if projection == "down" else sum(shares.values())
            for tile in source.tiles(projection):
                # Not held by a name: a tile may be a whole matrix, and must be gone before the next is summed.
                place(projection, tile, neurons, _average(source, shares, projection, tile, total))
    if merged.down_bias is not None:
        merged.down_bias.copy_(output_bias_D)
    return merged if merged.width == width else keep_salient(experts, merged, width)


def deal(experts: Sequence[int], blocks: int) -> list[list[int]]:
    """Experts dealt out like cards, so that every block has important ones."""
    return [list(experts[block::blocks]) for block in range(blocks)]


def refuse_empty_blocks(request: MergeRequest, parameters: object = None) -> Refusal | None:
    """Where a width takes more blocks than there are experts to fill them."""
    blocks = -(-request.width // request.expert_width)
    if request.chosen is None or blocks <= request.chosen:
        return None
    most = request.chosen * request.expert_width
    return Refusal(
        "width",
        f"is {request.width}, {blocks} blocks of one expert's {request.expert_width} neurons, but merge "
        f"'{request.merge}' has only {request.chosen} selected experts to make them of; write at most {most}, or "
        f"select at least {blocks} experts",
    )


def _average(source: RowSource, shares: Mapping[int, float], projection: Projection, tile: slice, total: float) -> Rows:
    """By raw weights, and divided once: the average of equal numbers is then that number."""
    summed: Rows | None = None
    for expert, share in shares.items():
        # As above: what is read goes before the next is.
        # Read in float32, which is quicker than to add bfloat16 to it.
        summed = _added(summed, source.rows(expert, projection, tile, torch.float32), share)
    assert summed is not None
    matrix, bias = summed
    return matrix.div_(total), None if bias is None else bias.div_(total)


def _added(summed: Rows | None, rows: Rows, share: float) -> Rows:
    if summed is None:
        return rows[0].float() * share, None if rows[1] is None else rows[1].float() * share
    for total, part in zip(summed, rows, strict=True):
        if total is not None and part is not None:
            total.add_(part, alpha=share)
    return summed


def _place(
    merged: ExpertWeights, output_bias_D: torch.Tensor, projection: Projection, tile: slice, neurons: slice, rows: Rows
) -> None:
    matrix, bias = rows
    if projection == "down":
        merged.down[tile, neurons] = matrix
        output_bias_D[tile] += 0.0 if bias is None else bias
        return
    places = slice(neurons.start + tile.start, neurons.start + tile.stop)
    getattr(merged, projection)[places] = matrix
    if bias is not None:
        getattr(merged, f"{projection}_bias")[places] = bias
