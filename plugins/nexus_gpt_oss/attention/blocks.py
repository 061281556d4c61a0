"""Attention with sinks in plain torch, a block of queries at a time: scores are never held for all of a sequence.

A block reads only the keys it can see, so a window of 128 costs 128 keys a query, and documents packed into a sequence
cost what they would alone. On the way back scores are computed again from queries, keys and each query's log-sum-exp.
A sink is a further key with a value of zero: it takes its share of the softmax and gives nothing back.

# B sequences, K key heads, G query heads per key head, S positions, C head width, Q queries of a block, N its keys
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nexus_gpt_oss.attention.visibility import Visibility

# Scores held at once, in numbers: blocks are as long as this allows.
SCORES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
SHORTEST_BLOCK, LONGEST_BLOCK = 16, 512


def attend(
    query_BASC: torch.Tensor,
    key_BKSC: torch.Tensor,
    value_BKSC: torch.Tensor,
    sinks_A: torch.Tensor,
    visibility: Visibility,
    scaling: float,
) -> torch.Tensor:
    """(B, A, S, C) for queries of A heads, of which A / K follow each other for a key head."""
    output: torch.Tensor = _Blocks.apply(query_BASC, key_BKSC, value_BKSC, sinks_A, visibility, scaling)
    return output


class _Blocks(torch.autograd.Function):
    """Keeps queries, keys, values, the output and a log-sum-exp per query."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BASC: torch.Tensor,
        key_BKSC: torch.Tensor,
        value_BKSC: torch.Tensor,
        sinks_A: torch.Tensor,
        visibility: Visibility,
        scaling: float,
    ) -> torch.Tensor:
        query, key, value = _by_key_head(query_BASC, key_BKSC), key_BKSC, value_BKSC
        sinks = _wide(sinks_A).view(1, key.shape[1], -1, 1)
        output = torch.empty_like(query)
        log_sums = torch.empty(query.shape[:-1], dtype=sinks.dtype, device=query.device)
        for queries, keys in _blocks(query, visibility):
            scores = _scores(query, key, queries, keys, visibility, scaling)
            log_sum = torch.logaddexp(torch.logsumexp(scores, dim=-1), sinks)
            shares = scores.sub_(log_sum.unsqueeze(-1)).exp_()
            output[:, :, :, queries] = shares.to(value.dtype) @ _columns(value, keys)
            log_sums[:, :, :, queries] = log_sum
        ctx.save_for_backward(query_BASC, key_BKSC, value_BKSC, sinks_A, output, log_sums)
        ctx.visibility, ctx.scaling = visibility, scaling
        return output.view(query_BASC.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BASC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BASC, key, value, sinks_A, output, log_sums = ctx.saved_tensors
        query, grad = _by_key_head(query_BASC, key), _by_key_head(grad_BASC, key)
        grad_query = torch.empty_like(query)
        # Keys are met by many blocks: their sums are kept wide.
        grad_key, grad_value = (torch.zeros(key.shape, dtype=log_sums.dtype, device=key.device) for _ in range(2))
        # What a query's shares would gain together; scores move against it.
        mean_gain = (_wide(grad) * _wide(output)).sum(dim=-1)
        for queries, keys in _blocks(query, ctx.visibility):
            scores = _scores(query, key, queries, keys, ctx.visibility, ctx.scaling)
            shares = scores.sub_(log_sums[:, :, :, queries].unsqueeze(-1)).exp_()
            grad_block = grad[:, :, :, queries]
            grad_value[:, :, keys] += _folded(shares.to(value.dtype)).transpose(-1, -2) @ _folded(grad_block)
            gains = _wide(grad_block @ _columns(value, keys).transpose(-1, -2))
            grad_scores = shares.mul_(gains.sub_(mean_gain[:, :, :, queries].unsqueeze(-1))).mul_(ctx.scaling)
            grad_scores = grad_scores.to(key.dtype)
            grad_query[:, :, :, queries] = grad_scores @ _columns(key, keys)
            grad_key[:, :, keys] += _folded(grad_scores).transpose(-1, -2) @ _folded(query[:, :, :, queries])
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            sinks = _wide(sinks_A).view(1, key.shape[1], -1, 1)
            grad_sinks = -((sinks - log_sums).exp() * mean_gain).sum(dim=(0, 3)).view(-1).to(sinks_A.dtype)
        grads = grad_query.view(query_BASC.shape), grad_key.to(key.dtype), grad_value.to(value.dtype)
        return *grads, grad_sinks, None, None


def _blocks(query: torch.Tensor, visibility: Visibility) -> Iterator[tuple[slice, slice]]:
    """Queries and the keys that they see, from the first to the last."""
    heads, length = query.shape[:3].numel(), query.shape[3]
    most = SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE["cuda"]) // heads
    # A window's block as long as the window has two keys for each that a query sees; a longer one has more.
    cap = LONGEST_BLOCK if visibility.window is None else min(LONGEST_BLOCK, visibility.window)
    start = 0
    while start < length:
        first_key = visibility.first_key(start)
        # Q queries of a block have Q + (start - first_key) keys at most: the longest Q whose scores are few enough.
        before = start - first_key
        longest = int((before * before / 4 + most) ** 0.5 - before / 2)
        stop = min(length, start + max(SHORTEST_BLOCK, min(cap, longest)))
        yield slice(start, stop), slice(first_key, stop)
        start = stop


def _scores(
    query: torch.Tensor, key: torch.Tensor, queries: slice, keys: slice, visibility: Visibility, scaling: float
) -> torch.Tensor:
    """(B, K, G, Q, N), float32 or wider, -inf where hidden."""
    scores = _wide(query[:, :, :, queries] @ _columns(key, keys).transpose(-1, -2)).mul_(scaling)
    return scores.masked_fill_(visibility.hidden(queries, keys, key.device)[:, None, None], -torch.inf)


def _by_key_head(heads_BASC: torch.Tensor, key_BKSC: torch.Tensor) -> torch.Tensor:
    """(B, K, G, S, C), contiguous."""
    batch, keys = key_BKSC.shape[:2]
    return heads_BASC.reshape(batch, keys, -1, *heads_BASC.shape[2:]).contiguous()


def _columns(heads_BKSC: torch.Tensor, keys: slice) -> torch.Tensor:
    """The keys' part, for all query heads of a key head: (B, K, 1, N, C)."""
    return heads_BKSC[:, :, None, keys]


def _folded(block: torch.Tensor) -> torch.Tensor:
    """(B, K, G * Q, X) for (B, K, G, Q, X): the query heads of a key head are summed over like queries."""
    return block.flatten(2, 3)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or wider if it is; always a new tensor where the type changes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
