"""Decoding by the same table in a loop that numba compiles: nearly as quick as copying the result. CPU only.

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
    table = pair_table(dtype, pairs_RP.device).numpy()
    out = pairs_RP.view(-1).numpy()
    if dtype == torch.bfloat16:
        # Two pairs are stored at a time: 64 bits, as float32's single pairs are.
        table, out, loop = table.view(np.uint32), out.view(np.uint64), _decode_two_pairs
    else:
        loop = _decode_pairs

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


# Indices are unsigned throughout: a signed one could count from the end, and the check for that costs a fifth.


@numba.njit(nogil=True, boundscheck=False, cache=True)
def _decode_two_pairs(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups):
    one, four, eight, half = np.uint64(1), np.uint64(4), np.uint64(8), np.uint64(32)
    for row in range(start, stop):
        bytes_B = packed[row * packed_stride : row * packed_stride + 16 * groups]
        scales_G = scales[row * scales_stride : row * scales_stride + groups]
        out_row = out[row * 8 * groups : (row + 1) * 8 * groups]
        for group in range(groups):
            entry = np.uint64(scales_G[np.uint64(group)]) << eight
            first = np.uint64(group) << four
            for i in range(8):
                byte = first + np.uint64(2 * i)
                low = np.uint64(table[entry | np.uint64(bytes_B[byte])])
                high = np.uint64(table[entry | np.uint64(bytes_B[byte + one])])
                out_row[byte >> one] = low | (high << half)


@numba.njit(nogil=True, boundscheck=False, cache=True)
def _decode_pairs(packed, packed_stride, scales, scales_stride, table, out, start, stop, groups):
    four, eight = np.uint64(4), np.uint64(8)
    for row in range(start, stop):
        bytes_B = packed[row * packed_stride : row * packed_stride + 16 * groups]
        scales_G = scales[row * scales_stride : row * scales_stride + groups]
        out_row = out[row * 16 * groups : (row + 1) * 16 * groups]
        for group in range(groups):
            entry = np.uint64(scales_G[np.uint64(group)]) << eight
            first = np.uint64(group) << four
            for i in range(16):
                byte = first + np.uint64(i)
                out_row[byte] = table[entry | np.uint64(bytes_B[byte])]
