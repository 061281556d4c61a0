"""What a merge strategy gets of a layer: its routed experts, read from the disk a part at a time.

# E experts, D hidden size, F expert width, W width of the shared expert, N kept inputs, R rows of a tile
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from nexus_core.errors import ShapeError
from nexus_core.statistics.saliency import LayerSaliency
from nexus_core.types import ExpertWeights

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")

Rows = tuple[torch.Tensor, torch.Tensor | None]
NeuronActivations = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Numbers of a tile: few enough that they and their float32 sum stay in the cache, enough that a read is worth its call.
TILE_NUMBERS = 3 << 18

# Rows further apart than this are read by themselves; what lies between nearer ones costs less than another read.
GAP_ROWS = 64


@dataclass(frozen=True)
class LayerExperts:
    """The E routed experts of one layer. Called with an index it gives that expert whole, anew at every call.

    width: F. dtype: what the merged expert is made in. read: one expert. read_rows: some rows of one matrix and its
    bias, in a type if one is given, where the family can (see `nexus_read_expert_rows`); without it every tile is a
    whole matrix. activations: the family's own, of gate and up (T, F). inputs_ND: what went into the layer, kept by
    collect. saliency: of its neurons, if the strategy's `needs` names it.
    """

    count: int
    width: int
    hidden_size: int
    has_biases: bool
    dtype: torch.dtype
    read: Callable[[int], ExpertWeights]
    activations: NeuronActivations
    read_rows: Callable[[int, Projection, slice, torch.dtype | None], Rows] | None = None
    inputs_ND: torch.Tensor | None = None
    saliency: LayerSaliency | None = None

    def __call__(self, expert: int) -> ExpertWeights:
        return self.read(expert)

    def shape(self, projection: Projection) -> tuple[int, int]:
        """Rows and columns of one expert's gate, up or down."""
        return (self.hidden_size, self.width) if projection == "down" else (self.width, self.hidden_size)

    def tiles(self, projection: Projection) -> Iterator[slice]:
        """The rows of a matrix in stretches that are quick to read and to add up."""
        rows, columns = self.shape(projection)
        step = max(1, TILE_NUMBERS // columns) if self.read_rows else rows
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def rows(self, expert: int, projection: Projection, rows: slice, dtype: torch.dtype | None = None) -> Rows:
        """Some rows of an expert's matrix, and of its bias. dtype: as they are read if left out."""
        if self.read_rows:
            return self.read_rows(expert, projection, rows, dtype)
        weights = self.read(expert)
        bias = getattr(weights, f"{projection}_bias")
        found: Rows = getattr(weights, projection)[rows], None if bias is None else bias[rows]
        return found if dtype is None else (found[0].to(dtype), None if found[1] is None else found[1].to(dtype))

    def matrix(
        self,
        expert: int,
        projection: Projection,
        dtype: torch.dtype | None = None,
        order: torch.Tensor | None = None,
    ) -> Rows:
        """A whole matrix of an expert, and its bias, put together from tiles: no second copy of it is ever held.

        dtype: as it is read if left out. order: which of its rows becomes the first, the second, ...
        """
        shape = self.shape(projection)
        place_of = None if order is None else torch.argsort(order)
        matrix: torch.Tensor | None = None
        held_bias: torch.Tensor | None = None
        for tile in self.tiles(projection):
            rows, bias = self.rows(expert, projection, tile)
            if matrix is None:
                matrix = torch.empty(shape, dtype=dtype or rows.dtype)
                held_bias = None if bias is None else torch.empty(shape[0], dtype=dtype or bias.dtype)
            places = tile if place_of is None else place_of[tile]
            matrix[places] = rows.to(matrix.dtype)
            if held_bias is not None and bias is not None:
                held_bias[places] = bias.to(held_bias.dtype)
        assert matrix is not None
        return matrix, held_bias

    def runs(self, neurons: list[int]) -> Iterator[tuple[slice, slice]]:
        """Ascending neurons in stretches to read at once: the rows, and which of `neurons` lie in them."""
        start = 0
        for place, neuron in enumerate(neurons):
            is_last = place + 1 == len(neurons)
            if is_last or neurons[place + 1] - neuron > GAP_ROWS:
                yield slice(neurons[start], neuron + 1), slice(start, place + 1)
                start = place + 1

    def neuron_activations(self, expert: int, inputs_ND: torch.Tensor) -> torch.Tensor:
        """What an expert's neurons put out for some inputs, (N, F) float32."""
        gate_NF, up_NF = (self._linear(expert, projection, inputs_ND) for projection in PROJECTIONS[:2])
        return self.activations(gate_NF, up_NF)

    def _linear(self, expert: int, projection: Projection, inputs_ND: torch.Tensor) -> torch.Tensor:
        parts = []
        for tile in self.tiles(projection):
            weight, bias = self.rows(expert, projection, tile)
            parts.append(functional.linear(inputs_ND, weight.float(), None if bias is None else bias.float()))
        return torch.cat(parts, dim=1)

    def blank(self, width: int) -> ExpertWeights:
        """An expert of `width` neurons to write into: all zeros."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype)

        sizes = (width, width, self.hidden_size) if self.has_biases else ()
        return ExpertWeights(
            zeros(width, self.hidden_size),
            zeros(width, self.hidden_size),
            zeros(self.hidden_size, width),
            *(zeros(size) for size in sizes),
        )


def tensors(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """The tensors an expert has, by field name."""
    return {name: value for name, value in vars(weights).items() if value is not None}


def check_merged(merged: ExpertWeights, merge: str, width: int, hidden_size: int) -> None:
    """Raise ShapeError unless what a strategy returned is an expert of that width."""
    expected = {"gate": (width, hidden_size), "up": (width, hidden_size), "down": (hidden_size, width)}
    for name, shape in expected.items():
        found = tuple(getattr(merged, name).shape)
        if found != shape:
            raise ShapeError(f"merge '{merge}' gave a {name} of {list(found)} where {list(shape)} is wanted")
