"""Experts decoded a group at a time into one bounded buffer, and multiplied by grouped products where torch has them.

# R rows sorted by expert, N experts of a group, O outputs, I inputs
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch.nn import functional

from nexus_core.errors import UsageError
from nexus_gpt_oss.backends.rows import PackedMatrix, SortedRows, sent
from nexus_gpt_oss.backends.workspace import workspace
from nexus_gpt_oss.decoding.format import PAIR_TYPES
from nexus_gpt_oss.mxfp4 import decode

BUFFER_VARIABLE = "NEXUS_GPT_OSS_DECODED_MB"
# Eight of gpt-oss's gate_up matrices, sixteen of its down ones: enough for a grouped product. At 8,192 tokens an expert
# of gpt-oss-120b has 256 rows on average; a launch multiplies 8 x 256 rows by 5,760 x 2,880 numbers, 68 GFLOP, which
# take 0.17 ms at 400 TFLOP/s, against about 10 us for launching. A larger buffer only takes memory.
DEFAULT_BUFFER_MB = 256

# Rows (S, X) of N groups that end at `stops`, times matrices (N, X, Y), plus a bias (S, Y) if there is one, are written
# to the last (S, Y).
GroupedProduct = Callable[[torch.Tensor, torch.Tensor, Sequence[int], torch.Tensor | None, torch.Tensor], None]


class GroupedProducts:
    """See `Products`. buffer_bytes: of decoded numbers at a time; one expert's matrix is, however large."""

    name = "grouped"

    def __init__(self, buffer_bytes: int, multiply: GroupedProduct):
        self._buffer_bytes, self._multiply = buffer_bytes, multiply

    def outputs(self, matrix: PackedMatrix, rows: SortedRows, rows_RI: torch.Tensor, out: torch.Tensor) -> None:
        for experts, place, stops in self._groups(matrix, rows, rows_RI.dtype):
            bias = matrix.bias_of(rows.experts_R[place], rows_RI.dtype)
            # Decoded experts get no name, here and below: it would hold them while the next are made.
            self._multiply(
                rows_RI[place], _decoded(matrix, experts, rows_RI.dtype).transpose(1, 2), stops, bias, out[place]
            )

    def inputs(self, matrix: PackedMatrix, rows: SortedRows, grad_RO: torch.Tensor, out: torch.Tensor) -> None:
        for experts, place, stops in self._groups(matrix, rows, grad_RO.dtype):
            self._multiply(grad_RO[place], _decoded(matrix, experts, grad_RO.dtype), stops, None, out[place])

    def _groups(
        self, matrix: PackedMatrix, rows: SortedRows, dtype: torch.dtype
    ) -> Iterator[tuple[list[int], slice, list[int]]]:
        """Experts with rows, as many as the buffer holds; their rows; and where in these each one's end."""
        expert_bytes = matrix.outputs * matrix.inputs * max(dtype.itemsize, 2)
        size = max(1, self._buffer_bytes // expert_bytes)
        chosen = list(rows.by_expert())
        for start in range(0, len(chosen), size):
            group = chosen[start : start + size]
            place = slice(group[0][1].start, group[-1][1].stop)
            yield [expert for expert, _ in group], place, [of_expert.stop - place.start for _, of_expert in group]


def buffer_bytes() -> int:
    """How many decoded bytes may be held at once. Raises UsageError if the environment gives no positive number."""
    given = os.environ.get(BUFFER_VARIABLE) or str(DEFAULT_BUFFER_MB)
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"{BUFFER_VARIABLE}={given}: not a positive number of megabytes; correct it or unset it")
    return int(given) << 20


def multiply_by_torch(
    rows_SX: torch.Tensor,
    matrices_NXY: torch.Tensor,
    stops: Sequence[int],
    bias_SY: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """By torch.nn.functional.grouped_mm: one launch for all groups."""
    product_SY = functional.grouped_mm(rows_SX, matrices_NXY, offs=sent(stops, rows_SX.device))
    if bias_SY is None:
        out.copy_(product_SY)
    else:
        torch.add(product_SY, bias_SY, out=out)


def multiply_in_turn(
    rows_SX: torch.Tensor,
    matrices_NXY: torch.Tensor,
    stops: Sequence[int],
    bias_SY: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """One product after the other, for types and devices that grouped_mm does not know."""
    start = 0
    for matrix_XY, stop in zip(matrices_NXY, stops, strict=True):
        torch.mm(rows_SX[start:stop], matrix_XY, out=out[start:stop])
        start = stop
    if bias_SY is not None:
        out.add_(bias_SY)


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
