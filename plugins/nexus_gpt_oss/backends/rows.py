"""What every backend starts from: packed matrices, and the rows of work that a router's choice makes.

# T tokens, K experts per token, E experts, D hidden size, F twice the expert width, O outputs, G groups of 32 inputs
# R = T * K rows, one per token and chosen expert, sorted by expert, then token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from nexus_core.additions import Activation
from nexus_core.errors import ShapeError
from nexus_gpt_oss.decoding.format import GROUP

# Bounds what is held at once where rows have nothing to do with each other. An activation's gradient holds twelve
# numbers or so for each of a row's neurons: 140 MB at 2,880 of them. On a GPU an operation on so many rows moves 35 MB,
# which takes longer than its launch.
ROWS_AT_A_TIME = 2048


@dataclass(frozen=True)
class PackedMatrix:
    """One projection of all experts: blocks (E, O, G, 16), scales (E, O, G), bias (E, O)."""

    blocks: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    def bias_of(self, experts: int | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(O,) of one expert, (N, O) of several."""
        return self.bias[experts].to(dtype)

    @property
    def outputs(self) -> int:
        return self.scales.shape[1]

    @property
    def inputs(self) -> int:
        return self.scales.shape[2] * GROUP


@dataclass(frozen=True)
class Experts:
    """A layer's experts. gate_up: rows alternate, gate 0, up 0, gate 1, up 1 and so on."""

    gate_up: PackedMatrix
    down: PackedMatrix
    activation: Activation


@dataclass(frozen=True)
class Needs:
    """Which gradients will be asked for."""

    hidden: bool
    weights: bool


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for the way back, by row; which of it is the backend's to say."""

    gate_up_RF: torch.Tensor | None = None
    outputs_RD: torch.Tensor | None = None


@dataclass(frozen=True)
class Forward:
    """What a forward pass gives: the weighted sum of each token's experts, and what it keeps."""

    summed_TD: torch.Tensor
    kept: Kept


@dataclass(frozen=True)
class Gradients:
    """Those that are needed: of the hidden states (T, D), and of the gate weights (T, K)."""

    hidden_TD: torch.Tensor | None
    weights_TK: torch.Tensor | None


@dataclass(frozen=True)
class SortedRows:
    """Rows that follow each other. counts: of each expert. order_R: each row's place in the flattened (T, K)."""

    counts: list[int]
    order_R: torch.Tensor
    experts_per_token: int

    @cached_property
    def tokens_R(self) -> torch.Tensor:
        return self.order_R // self.experts_per_token

    @cached_property
    def experts_R(self) -> torch.Tensor:
        device = self.order_R.device
        experts = torch.arange(len(self.counts), device=device)
        return torch.repeat_interleave(experts, sent(self.counts, device), output_size=len(self.order_R))

    def by_expert(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and which."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


@dataclass(frozen=True)
class Routing(SortedRows):
    """All rows that there are."""

    @cached_property
    def rows_TK(self) -> torch.Tensor:
        """The row of each token's k-th expert: the inverse of order_R."""
        rows = torch.empty_like(self.order_R)
        rows[self.order_R] = torch.arange(len(rows), device=rows.device)
        return rows.view(-1, self.experts_per_token)

    def slices(self, most_rows: int) -> Iterator[tuple[slice, SortedRows]]:
        """All rows in turn, at most so many at a time, but of whole experts: one's are never torn, however many."""
        counts, start, stop = [0] * len(self.counts), 0, 0
        for expert, rows in self.by_expert():
            if start < stop and rows.stop - start > most_rows:
                yield slice(start, stop), SortedRows(counts, self.order_R[start:stop], self.experts_per_token)
                counts, start = [0] * len(self.counts), stop
            counts[expert], stop = rows.stop - rows.start, rows.stop
        if start < stop:
            yield slice(start, stop), SortedRows(counts, self.order_R[start:stop], self.experts_per_token)


def sort_by_expert(indices_TK: torch.Tensor, experts: int) -> Routing:
    """Raises ShapeError for an expert index outside 0 to experts - 1."""
    flat = indices_TK.reshape(-1)
    counts = torch.bincount(flat, minlength=experts).tolist()
    if len(counts) > experts:
        raise ShapeError(f"packed experts: a token is routed to expert {len(counts) - 1} of experts 0-{experts - 1}")
    return Routing(counts, torch.argsort(flat, stable=True), indices_TK.shape[1])


def pieces(rows: int) -> list[slice]:
    """All rows, at most ROWS_AT_A_TIME in a piece; one empty piece for none."""
    return [slice(start, start + ROWS_AT_A_TIME) for start in range(0, max(rows, 1), ROWS_AT_A_TIME)]


def gate_weight_gradient(routing: Routing, grad_TD: torch.Tensor, outputs_RD: torch.Tensor) -> torch.Tensor:
    """The gradient (T, K) of the gate weights: each row's output times the gradient of its token's sum."""
    grad_R = grad_TD.new_empty(len(outputs_RD))
    for rows in pieces(len(outputs_RD)):
        grad_R[rows] = (grad_TD[routing.tokens_R[rows]] * outputs_RD[rows]).sum(dim=-1)
    return torch.empty_like(grad_R).index_copy_(0, routing.order_R, grad_R).view(-1, routing.experts_per_token)


def sent(numbers: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Whole numbers, int32, on the device, without waiting for what it is doing."""
    is_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=is_gpu).to(device, non_blocking=is_gpu)
