"""Ascending sets of vocabulary ids in close to the fewest bits there can be: Elias-Fano coding, many sets at once.

A set of k ids below V keeps the low l = floor(log2(V / k)) bits of each id as they are, and the high bits in unary: bit
(id >> l) + rank of the set's own stretch is 1. That is at most 2 + log2(V / k) bits an id, any id below V, without
decoding what stands before. Source: Elias 1974, Fano 1971.

    # n sets, N ids of all sets together
"""

from __future__ import annotations

import numpy as np


def encode(ids_N: np.ndarray, counts_n: np.ndarray, vocabulary_size: int) -> bytes:
    """The sets one after the other; ids_N: ascending within each set; counts_n: of each set, none of them 0."""
    counts_n = counts_n.astype(np.int64)
    low_bits_n, stretches_n = _layout(counts_n, vocabulary_size)
    low_bits_N = np.repeat(low_bits_n, counts_n)
    ids_N = ids_N.astype(np.int64)
    low_starts_N = np.cumsum(low_bits_N) - low_bits_N
    low = np.zeros(int(low_bits_N.sum()), dtype=np.uint8)
    for bit in range(int(low_bits_n.max(initial=0))):
        has_bit = low_bits_N > bit
        low[low_starts_N[has_bit] + bit] = (ids_N[has_bit] >> bit) & 1
    high = np.zeros(int(stretches_n.sum()), dtype=np.uint8)
    high[_stretch_starts(stretches_n, counts_n) + (ids_N >> low_bits_N) + _ranks(counts_n)] = 1
    return np.packbits(low).tobytes() + np.packbits(high).tobytes()


def decode(data: np.ndarray, counts_n: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """The ids (N,) int64 that `encode` was given. data: its bytes as uint8, and nothing else."""
    counts_n = counts_n.astype(np.int64)
    low_bits_n, stretches_n = _layout(counts_n, vocabulary_size)
    low_bits_N = np.repeat(low_bits_n, counts_n)
    total_low = int(low_bits_N.sum())
    split = -(-total_low // 8)
    low = np.unpackbits(data[:split], count=total_low)
    high = np.unpackbits(data[split:], count=int(stretches_n.sum()))
    ids_N = (np.flatnonzero(high) - _stretch_starts(stretches_n, counts_n) - _ranks(counts_n)) << low_bits_N
    low_starts_N = np.cumsum(low_bits_N) - low_bits_N
    for bit in range(int(low_bits_n.max(initial=0))):
        has_bit = low_bits_N > bit
        ids_N[has_bit] |= low[low_starts_N[has_bit] + bit].astype(np.int64) << bit
    return ids_N


def coded_bytes(counts_n: np.ndarray, vocabulary_size: int) -> int:
    """How many bytes `encode` makes of sets of these sizes."""
    counts_n = counts_n.astype(np.int64)
    low_bits_n, stretches_n = _layout(counts_n, vocabulary_size)
    return -(-int((low_bits_n * counts_n).sum()) // 8) - (-int(stretches_n.sum()) // 8)


def _layout(counts_n: np.ndarray, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Low bits per id, and length of the unary stretch, of every set."""
    ratio_n = np.maximum(vocabulary_size // np.maximum(counts_n, 1), 1)
    low_bits_n = np.frexp(ratio_n.astype(np.float64))[1].astype(np.int64) - 1  # floor(log2), exact for whole numbers
    return low_bits_n, ((vocabulary_size - 1) >> low_bits_n) + counts_n


def _stretch_starts(stretches_n: np.ndarray, counts_n: np.ndarray) -> np.ndarray:
    return np.repeat(np.cumsum(stretches_n) - stretches_n, counts_n)


def _ranks(counts_n: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within every set."""
    return np.arange(int(counts_n.sum())) - np.repeat(np.cumsum(counts_n) - counts_n, counts_n)
