"""Products with experts that are decoded inside the product, tile by tile, and never written: Triton, CUDA only.

A program multiplies up to ROWS rows of one expert with up to COLUMNS outputs. Every output is summed by one program, in
one order, so results are the same in every run.

# R rows sorted by expert, O outputs, I inputs, G groups of 32 inputs, P programs' tiles of rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nexus_gpt_oss.backends.rows import PackedMatrix, SortedRows, sent
from nexus_gpt_oss.decoding.format import GROUP_BYTES
from nexus_gpt_oss.decoding.triton_bits import is_interpreted


@dataclass(frozen=True)
class Tile:
    """rows and columns of the result that one program computes, depth: how much of the sum it takes at a time."""

    rows: int
    columns: int
    depth: int
    warps: int

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel for this tile is compiled with."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "GROUP_BYTES": GROUP_BYTES,
            # The interpreter has no bfloat16 products.
            "COMPUTE": tl.float32 if is_interpreted() else tl.bfloat16,
        }


# Small ones for few rows an expert, large ones so that a decoded weight is used by as many rows as possible.
TILES = (Tile(16, 64, 128, 4), Tile(64, 128, 64, 4), Tile(128, 128, 64, 8), Tile(256, 64, 64, 8))


class FusedProducts:
    """See `Products`."""

    name = "fused"

    def __init__(self, tile: Tile):
        self.tile = tile

    def outputs(self, matrix: PackedMatrix, rows: SortedRows, rows_RI: torch.Tensor, out: torch.Tensor) -> None:
        self._launch(_outputs_kernel, matrix, rows, rows_RI, out, matrix.bias.contiguous())

    def inputs(self, matrix: PackedMatrix, rows: SortedRows, grad_RO: torch.Tensor, out: torch.Tensor) -> None:
        self._launch(_inputs_kernel, matrix, rows, grad_RO, out)

    def _launch(
        self,
        kernel: Any,
        matrix: PackedMatrix,
        sorted_rows: SortedRows,
        rows: torch.Tensor,
        product: torch.Tensor,
        *bias: Any,
    ) -> None:
        tile = self.tile
        tiles_P3 = _tiles(sorted_rows, tile.rows)
        programs = len(tiles_P3) * triton.cdiv(product.shape[1], tile.columns)
        if not programs:
            return
        with torch.cuda.device_of(rows):
            kernel[(programs,)](
                rows.contiguous(),
                matrix.blocks.contiguous(),
                matrix.scales.contiguous(),
                *bias,
                product,
                tiles_P3,
                matrix.outputs,
                matrix.inputs,
                **tile.constants,
                num_warps=tile.warps,
            )


def _tiles(sorted_rows: SortedRows, rows_per_tile: int) -> torch.Tensor:
    """(P, 3) int32: expert, first row, and the row after the expert's last, for every tile of rows."""
    tiles = [
        (expert, first, rows.stop)
        for expert, rows in sorted_rows.by_expert()
        for first in range(rows.start, rows.stop, rows_per_tile)
    ]
    return sent(tiles, sorted_rows.order_R.device).view(-1, 3)


@triton.jit
def _decoded(blocks, scales, row, byte, inside, row_bytes, BYTES: tl.constexpr, GROUP_BYTES: tl.constexpr):
    """Numbers (len(row), 2 * BYTES), float32, of the bytes `byte`, whole groups, of some rows of one expert."""
    packed = tl.load(blocks + row[:, None].to(tl.int64) * row_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
    # FP4's bits at the place of a float32's exponent and fraction are the number itself, 2**126 times too small.
    low = ((packed & 7) << 22) | ((packed & 8) << 28)
    high = ((packed & 0x70) << 18) | ((packed & 0x80) << 24)
    scale = tl.load(
        scales + row[:, None].to(tl.int64) * (row_bytes // GROUP_BYTES) + byte[None, :] // GROUP_BYTES,
        mask=inside,
        other=0,
    ).to(tl.int32)
    # A scale is a float32's exponent; 0 stands for 2**-127, a subnormal, and 255 for NaN.
    power = tl.where(scale == 0, 0x400000, tl.where(scale == 255, 0x7FC00000, scale << 23)).to(tl.float32, bitcast=True)
    # Two steps: the first is exact, so that the second rounds once. 2.0**126:
    exact = 85070591730234615865843651857942052864.0
    low_number = low.to(tl.float32, bitcast=True) * exact * power
    high_number = high.to(tl.float32, bitcast=True) * exact * power
    return tl.reshape(tl.join(low_number, high_number), (row.shape[0], 2 * BYTES))


@triton.jit
def _outputs_kernel(
    rows, blocks, scales, bias, product, tiles, outputs, inputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP_BYTES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    column_tiles = (outputs + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles
    expert, first, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    row = first + tl.arange(0, ROWS)
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < stop, column < outputs
    row_bytes = inputs // 2
    expert_blocks = blocks + expert.to(tl.int64) * outputs * row_bytes
    expert_scales = scales + expert.to(tl.int64) * outputs * (row_bytes // GROUP_BYTES)
    summed = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, inputs, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        byte = start // 2 + tl.arange(0, DEPTH // 2)
        left = tl.load(
            rows + row[:, None].to(tl.int64) * inputs + depth[None, :],
            mask=is_row[:, None] & (depth < inputs)[None, :],
            other=0,
        )
        inside = is_column[:, None] & (byte < row_bytes)[None, :]
        right = _decoded(expert_blocks, expert_scales, column, byte, inside, row_bytes, DEPTH // 2, GROUP_BYTES)
        summed = tl.dot(left.to(COMPUTE), tl.trans(right.to(COMPUTE)), summed, input_precision="ieee")
    summed += tl.load(bias + expert * outputs + column, mask=is_column, other=0).to(tl.float32)[None, :]
    place = product + row[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(place, summed.to(product.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _inputs_kernel(
    rows, blocks, scales, product, tiles, outputs, inputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP_BYTES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    column_tiles = (inputs + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles
    expert, first, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    row = first + tl.arange(0, ROWS)
    start_column = (tl.program_id(0) % column_tiles) * COLUMNS
    column = start_column + tl.arange(0, COLUMNS)
    byte = start_column // 2 + tl.arange(0, COLUMNS // 2)
    is_row, is_column = row < stop, column < inputs
    row_bytes = inputs // 2
    expert_blocks = blocks + expert.to(tl.int64) * outputs * row_bytes
    expert_scales = scales + expert.to(tl.int64) * outputs * (row_bytes // GROUP_BYTES)
    summed = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, outputs, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            rows + row[:, None].to(tl.int64) * outputs + depth[None, :],
            mask=is_row[:, None] & (depth < outputs)[None, :],
            other=0,
        )
        inside = (depth < outputs)[:, None] & (byte < row_bytes)[None, :]
        right = _decoded(expert_blocks, expert_scales, depth, byte, inside, row_bytes, COLUMNS // 2, GROUP_BYTES)
        summed = tl.dot(left.to(COMPUTE), right.to(COMPUTE), summed, input_precision="ieee")
    place = product + row[:, None].to(tl.int64) * inputs + column[None, :]
    tl.store(place, summed.to(product.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
