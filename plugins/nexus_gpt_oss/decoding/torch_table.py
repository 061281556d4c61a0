"""Decoding by one table in plain torch: on any device, and what all others must equal to the bit.

# R rows, G groups of 32 numbers; a group is 16 bytes, 16 pairs of numbers, and one scale
"""

from __future__ import annotations

from functools import lru_cache

import torch

from nexus_gpt_oss.decoding.format import FP4, GROUP_BYTES, MAX_SCALE, PAIR_TYPES, SCALE_BIAS

# Bytes decoded at a time. On a CPU the lookup's indices should stay in the second-level cache (256 rows of 2880
# numbers were fastest); elsewhere few, large kernels are.
CPU_TILE_BYTES = 3 << 17
DEVICE_TILE_BYTES = 1 << 26


def decode_pairs(bytes_RGB: torch.Tensor, scales_RG: torch.Tensor, pairs_RP: torch.Tensor, dtype: torch.dtype) -> None:
    """Fill pairs_RP (R, 16 G), of PAIR_TYPES[dtype], from bytes (R, G, 16) and scales (R, G), both uint8."""
    rows, groups = scales_RG.shape
    table = pair_table(dtype, pairs_RP.device)
    tile_bytes = CPU_TILE_BYTES if pairs_RP.device.type == "cpu" else DEVICE_TILE_BYTES
    rows_per_tile = max(1, tile_bytes // (groups * GROUP_BYTES))
    index = torch.empty((min(rows, rows_per_tile), groups, GROUP_BYTES), dtype=torch.int32, device=pairs_RP.device)
    for start in range(0, rows, rows_per_tile):
        tile = slice(start, min(start + rows_per_tile, rows))
        index_RGB = index[: tile.stop - tile.start]
        # Widening in one pass and adding in the next is quicker than one mixed pass, whose inner loop is 16 short.
        index_RGB.copy_(bytes_RGB[tile])
        index_RGB.add_((scales_RG[tile].to(torch.int32) << 8).unsqueeze(-1))
        torch.index_select(table, 0, index_RGB.view(-1), out=pairs_RP[tile].view(-1))


@lru_cache(maxsize=8)
def pair_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Entry 256 * scale + byte: the byte's two numbers at that scale, as one integer of PAIR_TYPES[dtype]."""
    byte = torch.arange(256)
    fp4 = torch.tensor(FP4, dtype=torch.float64)
    pairs = torch.stack((fp4[byte & 15], fp4[byte >> 4]), dim=-1)
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - SCALE_BIAS)
    powers[MAX_SCALE + 1] = torch.nan
    # From float64, so that 6 * 2**127 becomes infinity and 0.5 * 2**-127 its exact subnormal, as in the reference.
    table = (powers[:, None, None] * pairs).to(dtype)
    return table.view(PAIR_TYPES[dtype]).reshape(-1).to(device)
