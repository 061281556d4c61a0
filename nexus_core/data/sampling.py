"""Which of the candidate documents to use, when a budget of tokens does not take them all."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nexus_core.data.documents import Document
from nexus_core.errors import DataError, suggestion

# V vocabulary; n tokens of one document, u different ones among them

# Documents whose gain is computed in one go.
LOOKED_AT_ONCE = 64


def choose(
    documents: Sequence[Document],
    tokens: int,
    strategy: str,
    vocabulary_size: int,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Document], dict[str, Any]]:
    """Documents of at least `tokens` tokens together (all, if there are fewer), and how well they stand for the pool.

    The report compares the choice with the pool it was chosen from, and with a random draw of the same size:
    kl_to_pool_nats is KL(chosen || pool) of the token frequencies, vocabulary_coverage the share of the pool's
    different tokens that occur. advance: told the tokens of each document as it is chosen. Raises DataError if there
    is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise DataError(f"sampling strategy '{strategy}' is not known{suggestion(strategy, STRATEGIES)}")
    chosen = []
    for index in STRATEGIES[strategy](documents, tokens, vocabulary_size, np.random.default_rng([seed, 0])):
        chosen.append(index)
        advance(len(documents[index]))
    # Another stream of random numbers, or the comparison of `uniform` would be with itself.
    random = list(uniform(documents, tokens, vocabulary_size, np.random.default_rng([seed, 1])))
    pool_V = token_counts(documents, vocabulary_size)
    report: dict[str, Any] = {
        "strategy": strategy,
        "candidates": len(documents),
        "candidate_tokens": int(pool_V.sum()),
    }
    for name, choice in (("chosen", chosen), ("random", random)):
        counts_V = token_counts([documents[index] for index in choice], vocabulary_size)
        report[name] = {
            "documents": len(choice),
            "tokens": int(counts_V.sum()),
            "kl_to_pool_nats": kl_to_pool(counts_V, pool_V),
            "vocabulary_coverage": float((counts_V > 0).sum() / max((pool_V > 0).sum(), 1)),
        }
    return [documents[index] for index in chosen], report


def uniform(
    documents: Sequence[Document], tokens: int, vocabulary_size: int, generator: np.random.Generator
) -> Iterator[int]:
    """Indices of documents drawn at random, without replacement, until there are `tokens` tokens."""
    left = tokens
    for index in generator.permutation(len(documents)).tolist():
        if left <= 0:
            return
        yield index
        left -= len(documents[index])


def coverage(
    documents: Sequence[Document], tokens: int, vocabulary_size: int, generator: np.random.Generator
) -> Iterator[int]:
    """Indices of documents that together use the vocabulary as the pool does, greedily chosen by gain per token.

    The gain of counts n is sum over tokens t of sqrt(q_t n_t), q being the pool's frequencies: the Hellinger affinity
    to the pool but for the scale. It is concave in every count, so what a document adds only ever shrinks as others are
    chosen, an old value is an upper bound, and looking again only at the best bounds is exact (Minoux 1978). Per
    token, because otherwise the longest documents win whatever they say. Ties go to the document that comes first.
    """
    pool_V = token_counts(documents, vocabulary_size)
    root_q_V = np.sqrt(pool_V / max(pool_V.sum(), 1))
    uses = [np.unique(document.tokens, return_counts=True) for document in documents]
    lengths = np.array([len(document) for document in documents])
    counts_V = np.zeros(vocabulary_size)
    root_counts_V = np.zeros(vocabulary_size)

    def gains_per_token(indices: list[int]) -> list[float]:
        tokens_n = np.concatenate([uses[index][0] for index in indices])
        uses_n = np.concatenate([uses[index][1] for index in indices])
        added_n = root_q_V[tokens_n] * (np.sqrt(counts_V[tokens_n] + uses_n) - root_counts_V[tokens_n])
        sizes = np.array([len(uses[index][0]) for index in indices])
        return list(np.add.reduceat(added_n, np.cumsum(sizes) - sizes) / lengths[indices])

    # A heap of (minus an upper bound of the gain, index): its first is the most promising, the first of equals.
    bounds: list[tuple[float, int]] = []
    for start in range(0, len(documents), LOOKED_AT_ONCE):
        indices = list(range(start, min(start + LOOKED_AT_ONCE, len(documents))))
        bounds += zip((-gain for gain in gains_per_token(indices)), indices, strict=True)
    heapq.heapify(bounds)
    left = tokens
    while bounds and left > 0:
        # Gains lie close together, so a hundred bounds may have to be renewed for one choice: all at once.
        promising = [heapq.heappop(bounds)[1] for _ in range(min(LOOKED_AT_ONCE, len(bounds)))]
        fresh = sorted(zip((-gain for gain in gains_per_token(promising)), promising, strict=True))
        if not bounds or fresh[0] < bounds[0]:
            index = fresh.pop(0)[1]
            yield index
            tokens_u, uses_u = uses[index]
            counts_V[tokens_u] += uses_u
            root_counts_V[tokens_u] = np.sqrt(counts_V[tokens_u])
            left -= len(documents[index])
        for bound in fresh:
            heapq.heappush(bounds, bound)


STRATEGIES: dict[str, Callable[[Sequence[Document], int, int, np.random.Generator], Iterator[int]]] = {
    "coverage": coverage,
    "uniform": uniform,
}


def token_counts(documents: Sequence[Document], vocabulary_size: int) -> np.ndarray:
    """How often each token occurs, (V,) int64."""
    tokens = np.concatenate([document.tokens for document in documents] or [np.empty(0, dtype=np.int32)])
    return np.bincount(tokens, minlength=vocabulary_size)


def kl_to_pool(counts_V: np.ndarray, pool_V: np.ndarray) -> float:
    """KL(chosen || pool) of two token counts in nats; what is chosen is part of the pool, so it is finite."""
    used = counts_V > 0
    if not used.any():
        return 0.0
    p, q = counts_V[used] / counts_V.sum(), pool_V[used] / pool_V.sum()
    return float(np.sum(p * np.log(p / q)))
