"""Sums over tokens, a chunk of tokens at a time, so that float32 copies of vocabulary rows stay small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# 2**25 float32 numbers are 128 MiB: about 166 rows of a vocabulary of 201,088, all rows of a small one.
CHUNK_ELEMENTS = 2**25


def sum_over_tokens(
    function: Callable[..., torch.Tensor], *rows: torch.Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> torch.Tensor:
    """The sum of `function(*chunk)` over chunks of the first dimension that `rows` share.

    function: of equally many rows of each tensor to a scalar, additive over rows. Chunks are computed again in the
    backward pass, so only the rows themselves are kept for it. chunk_elements: numbers of the widest tensor per chunk.
    """
    tokens = rows[0].shape[0]
    width = max(row.numel() // max(tokens, 1) for row in rows)
    size = max(1, chunk_elements // max(width, 1))
    if tokens <= size:
        return function(*rows)
    total = rows[0].new_zeros((), dtype=torch.float32)
    for start in range(0, tokens, size):
        chunk = [row[start : start + size] for row in rows]
        total = total + checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total
