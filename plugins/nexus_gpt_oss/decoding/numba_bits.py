"""Decoding by integer arithmetic in loops that numba compiles to vector instructions: quicker than copying the result,
of which it reads but a quarter. CPU only.

The compiled loops are kept beside this file, or in the user's cache folder, so a machine compiles them once.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba
import numpy as np
import torch

from nexus_gpt_oss.decoding.format import GROUP_BYTES
from nexus_gpt_oss.decoding.torch_table import pair_table

# Rows are dealt to threads in pieces of at least this many bytes: waking a thread costs as much as decoding them.
BYTES_PER_THREAD = 1 << 18


def decode_pairs(bytes_RGB: torch.Tensor, scales_RG: torch.Tensor, pairs_RP: torch.Tensor, dtype: torch.dtype) -> None:
    """As `torch_table.decode_pairs`, on as many threads as torch has."""
    rows, groups = scales_RG.shape
    if bytes_RGB.stride()[1:] != (GROUP_BYTES, 1):
        bytes_RGB = bytes_RGB.contiguous()
    if groups > 1 and scales_RG.stride(1) != 1:
        scales_RG = scales_RG.contiguous()
    packed, scales = _flat(bytes_RGB), _flat(scales_RG)
    loop, word = (_to_bfloat16, np.uint32) if dtype == torch.bfloat16 else (_to_float32, np.uint64)
    table, out = (pairs.view(-1).numpy().view(word) for pairs in (pair_table(dtype, pairs_RP.device), pairs_RP))

    def decode_rows(start: int, stop: int) -> None:
        loop(packed, bytes_RGB.stride(0), scales, scales_RG.stride(0), table, out, start, stop, groups)

    threads = min(torch.get_num_threads(), rows * groups * GROUP_BYTES // BYTES_PER_THREAD)
    if threads < 2:
        decode_rows(0, rows)
        return
    bounds = [rows * thread // threads for thread in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(decode_rows, bounds[:-1], bounds[1:]))


def _flat(rows: torch.Tensor) -> np.ndarray:
    """The memory that the rows lie in, from the first one's first byte to the last one's last; what is between, too."""
    span = (rows.shape[0] - 1) * rows.stride(0) + rows[0].numel()
    flat: np.ndarray = rows.as_strided((span,), (1,)).numpy()
    return flat


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """process: a forked process has none of its parent's threads, so it gets a pool of its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mxfp4")


@numba.njit(nogil=True, boundscheck=False, cache=True)
def _to_bfloat16(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups):
    _decode_rows(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups, np.uint32, 16)


@numba.njit(nogil=True, boundscheck=False, cache=True)
def _to_float32(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups):
    _decode_rows(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups, np.uint64, 32)


# Inlined, so that a word's type is known there: in words of 32 bits twice as many fit a vector.
# Indices are unsigned throughout: a signed one could count from the end, and the check for that costs a fifth.


@numba.njit(inline="always")
def _decode_rows(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups, word, width):
    """Both numbers of a pair at once, each in its half of a word, `width` bits of it.

    An FP4's magnitude m is two bits of exponent and one of fraction, so the numbers from 1 to 6 at a scale s are
    ((s - 1) << 7) + (m << 6) as bfloat16, and 0.5, a subnormal there, is one m lower. At the ends of the scales, where
    an exponent may leave bfloat16's normal range, the table knows.
    """
    half = word(width)
    one = (word(1) << half) | word(1)
    for row in range(start, stop):
        bytes_B = packed[row * packed_stride : row * packed_stride + 16 * groups]
        scales_G = scales[row * scales_stride : row * scales_stride + groups]
        out_row = out[row * 16 * groups : (row + 1) * 16 * groups]
        for group in range(groups):
            scale = word(scales_G[np.uint64(group)])
            first = np.uint64(group) << np.uint64(4)
            if scale < word(2) or scale > word(251):
                entry = np.uint64(scale) << np.uint64(8)
                for i in range(16):
                    place = first + np.uint64(i)
                    out_row[place] = table[entry | np.uint64(bytes_B[place])]
                continue
            base = ((scale - word(1)) << word(7)) * one
            for i in range(16):
                place = first + np.uint64(i)
                byte = word(bytes_B[place])
                nibbles = (byte | (byte << (half - word(4)))) & (word(15) * one)
                magnitude = nibbles & (word(7) * one)
                above_one = (magnitude >> word(1)) | (magnitude >> word(2))
                is_half = magnitude & ~above_one & one
                is_not_zero = (magnitude | above_one) & one
                bits = (base + ((magnitude - is_half) << word(6))) & ((is_not_zero << half) - is_not_zero)
                sign = (nibbles & (word(8) * one)) << word(12)
                # float32 is bfloat16 with sixteen more bits of fraction.
                out_row[place] = (bits | sign) << (half - word(16))
