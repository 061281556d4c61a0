"""Experts decoded a group at a time into one bounded buffer, and multiplied by grouped products where torch has them.

# R rows sorted by expert, N experts of a group, O outputs, I inputs
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch.nn import functional

from nexus_core.errors import UsageError
from nexus_gpt_oss.backends.rows import PackedMatrix, Routing
from nexus_gpt_oss.backends.workspace import workspace
from nexus_gpt_oss.decoding.format import PAIR_TYPES
from nexus_gpt_oss.mxfp4 import decode

BUFFER_VARIABLE = "NEXUS_GPT_OSS_DECODED_MB"
DEFAULT_BUFFER_MB = 1024

# Rows (S, X) of N groups that end at `ends`, times matrices (N, X, Y).
GroupedProduct = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


class GroupedProducts:
    """See `Products`. buffer_bytes: of decoded numbers at a time; one expert's matrix is, however large."""

    name = "grouped"

    def __init__(self, buffer_bytes: int, multiply: GroupedProduct):
        self._buffer_bytes, self._multiply = buffer_bytes, multiply

    def outputs(self, matrix: PackedMatrix, routing: Routing, rows_RI: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for experts, rows, ends in self._groups(matrix, routing, rows_RI.dtype):
            decoded_NIO = _decoded(matrix, experts, rows_RI.dtype).transpose(1, 2)
            product = self._multiply(rows_RI[rows], decoded_NIO, ends)
            parts.append(product.add_(matrix.bias_of(routing.experts_R[rows], product.dtype)))
        return _joined(parts, rows_RI, matrix.outputs)

    def inputs(self, matrix: PackedMatrix, routing: Routing, grad_RO: torch.Tensor) -> torch.Tensor:
        parts = [
            self._multiply(grad_RO[rows], _decoded(matrix, experts, grad_RO.dtype), ends)
            for experts, rows, ends in self._groups(matrix, routing, grad_RO.dtype)
        ]
        return _joined(parts, grad_RO, matrix.inputs)

    def _groups(
        self, matrix: PackedMatrix, routing: Routing, dtype: torch.dtype
    ) -> Iterator[tuple[list[int], slice, list[int]]]:
        """Experts with rows, as many as the buffer holds; their rows; and where in these each one's end."""
        expert_bytes = matrix.outputs * matrix.inputs * max(dtype.itemsize, 2)
        size = max(1, self._buffer_bytes // expert_bytes)
        chosen = list(routing.by_expert())
        for start in range(0, len(chosen), size):
            group = chosen[start : start + size]
            first = group[0][1].start
            yield (
                [expert for expert, _ in group],
                slice(first, group[-1][1].stop),
                [rows.stop - first for _, rows in group],
            )


def buffer_bytes() -> int:
    """How many decoded bytes may be held at once. Raises UsageError if the environment gives no positive number."""
    given = os.environ.get(BUFFER_VARIABLE) or str(DEFAULT_BUFFER_MB)
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"{BUFFER_VARIABLE}={given}: not a positive number of megabytes; correct it or unset it")
    return int(given) << 20


def multiply_by_torch(rows_SX: torch.Tensor, matrices_NXY: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """By torch.nn.functional.grouped_mm: one launch for all groups."""
    offsets = torch.tensor(ends, dtype=torch.int32, device=rows_SX.device)
    return functional.grouped_mm(rows_SX, matrices_NXY, offs=offsets)


def multiply_in_turn(rows_SX: torch.Tensor, matrices_NXY: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """One product after the other, for types and devices that grouped_mm does not know."""
    product = rows_SX.new_empty((len(rows_SX), matrices_NXY.shape[2]))
    for matrix_XY, stop, count in zip(matrices_NXY, ends, _lengths(ends), strict=True):
        rows = slice(stop - count, stop)
        torch.mm(rows_SX[rows], matrix_XY, out=product[rows])
    return product


def _lengths(ends: list[int]) -> list[int]:
    return [stop - start for start, stop in zip([0, *ends], ends, strict=False)]


def _decoded(matrix: PackedMatrix, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
    """(N, O, I), until the next are asked for. Experts that follow each other are decoded in one go."""
    decoded = dtype if dtype in PAIR_TYPES else torch.float32
    out = workspace((len(experts), matrix.outputs, matrix.inputs), decoded, matrix.blocks.device)
    place = 0
    for _, run in groupby(enumerate(experts), key=lambda item: item[1] - item[0]):
        following = [expert for _, expert in run]
        source = slice(following[0], following[-1] + 1)
        decode(matrix.blocks[source], matrix.scales[source], decoded, out=out[place : place + len(following)])
        place += len(following)
    return out.to(dtype)


def _joined(parts: list[torch.Tensor], like: torch.Tensor, columns: int) -> torch.Tensor:
    if not parts:
        return like.new_empty((0, columns))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
