"""Which of the candidate documents to use, when a budget of tokens does not take them all.

A strategy is called as `(documents, tokens, vocabulary_size, generator)` and gives indices of documents, each once,
one after the other, until they hold `tokens` tokens together or none is left.
"""

# V vocabulary

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nexus_core.data.documents import Document
from nexus_core.data.sampling.coverage import coverage
from nexus_core.data.sampling.kl_greedy import kl_greedy
from nexus_core.data.sampling.uniform import uniform
from nexus_core.errors import DataError, suggestion

STRATEGIES: dict[str, Callable[[Sequence[Document], int, int, np.random.Generator], Iterator[int]]] = {
    "coverage": coverage,
    "uniform": uniform,
    "kl_greedy": kl_greedy,
}


def choose(
    documents: Sequence[Document],
    tokens: int,
    strategy: str,
    vocabulary_size: int,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Document], dict[str, Any]]:
    """Documents of at least `tokens` tokens together (all, if there are fewer), and how well they stand for the pool.

    advance: told the tokens of each document as it is chosen. The report holds, of the pool ("candidates"), of what was
    chosen ("chosen") and of a random draw of the same size ("random"), what `figures` tells. Raises DataError if there
    is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise DataError(f"sampling strategy '{strategy}' is not known{suggestion(strategy, STRATEGIES)}")
    chosen = []
    for index in STRATEGIES[strategy](documents, tokens, vocabulary_size, np.random.default_rng([seed, 0])):
        chosen.append(documents[index])
        advance(len(documents[index]))
    # Another stream of random numbers, or the comparison of `uniform` would be with itself.
    lot = np.random.default_rng([seed, 1])
    random = [documents[index] for index in uniform(documents, tokens, vocabulary_size, lot)]
    pool_V = token_counts(documents, vocabulary_size)
    report: dict[str, Any] = {
        "strategy": strategy,
        "candidates": len(documents),
        "candidate_tokens": int(pool_V.sum()),
        "candidate_tokens_by_source": tokens_by_source(documents),
        "chosen": figures(chosen, pool_V),
        "random": figures(random, pool_V),
    }
    return chosen, report


def figures(choice: Sequence[Document], pool_V: np.ndarray) -> dict[str, Any]:
    """How well a choice stands for the pool it was made from.

    kl_to_pool_nats is KL(choice || pool) of the token frequencies, vocabulary_coverage the share of the pool's
    different tokens that occur.
    """
    counts_V = token_counts(choice, len(pool_V))
    return {
        "documents": len(choice),
        "tokens": int(counts_V.sum()),
        "tokens_by_source": tokens_by_source(choice),
        "kl_to_pool_nats": kl_to_pool(counts_V, pool_V),
        "vocabulary_coverage": float((counts_V > 0).sum() / max((pool_V > 0).sum(), 1)),
    }


def token_counts(documents: Sequence[Document], vocabulary_size: int) -> np.ndarray:
    """How often each token occurs, (V,) int64."""
    tokens = np.concatenate([document.tokens for document in documents] or [np.empty(0, dtype=np.int32)])
    return np.bincount(tokens, minlength=vocabulary_size)


def tokens_by_source(documents: Sequence[Document]) -> dict[str, int]:
    """How many tokens come from each source, in the order of their names."""
    tokens: Counter[str] = Counter()
    for document in documents:
        tokens[document.source] += len(document)
    return dict(sorted(tokens.items()))


def kl_to_pool(counts_V: np.ndarray, pool_V: np.ndarray) -> float:
    """KL(chosen || pool) of two token counts in nats; what is chosen is part of the pool, so it is finite."""
    used = counts_V > 0
    if not used.any():
        return 0.0
    p, q = counts_V[used] / counts_V.sum(), pool_V[used] / pool_V.sum()
    return float(np.sum(p * np.log(p / q)))
