"""The first published rule of choosing documents, for comparison."""

# N documents, U different tokens, X entries (one per document and different token in it)

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nexus_core.data.documents import Document
from nexus_core.data.sampling.uses import TokenUses, token_uses

# What the rule adds to the divergence per token of a document.
LENGTH_BONUS = 0.01

# Documents whose score is computed in one go, and how near scores are that count as equal.
BLOCK_DOCUMENTS = 64
TIE = 1e-12


def kl_greedy(
    documents: Sequence[Document], tokens: int, vocabulary_size: int, generator: np.random.Generator
) -> Iterator[int]:
    """Indices of documents by the first published rule: the next is the one with the largest

        KL(chosen with it || pool) + 0.01 * its tokens

    Both parts work against the purpose: divergence from the pool counts for a document, and the length soon swamps it,
    so that what comes out is the longest first. Kept to compare with; ties go to the document that comes first.
    Source: github.com/eous/nexus.
    """
    indices = np.array([index for index, document in enumerate(documents) if len(document)], dtype=np.int64)
    if not len(indices):
        return
    left = tokens
    for place in _greedy(token_uses([documents[index] for index in indices])):
        if left <= 0:
            return
        index = int(indices[place])
        yield index
        left -= len(documents[index])


def _greedy(uses: TokenUses) -> Iterator[int]:
    log_q_U = np.log(uses.frequency_U)
    counts_U = np.zeros(len(log_q_U))
    # Of the chosen counts n, the sum of n and of n * log(n / q), which is all that their KL to the pool takes.
    chosen_tokens, chosen_sum = 0, 0.0

    def added(entries: np.ndarray | slice) -> np.ndarray:
        """What some documents' entries (X,) would add to the second sum."""
        tokens_X = uses.tokens_X[entries]
        before_X, log_q_X = counts_U[tokens_X], log_q_U[tokens_X]
        after_X = before_X + uses.uses_X[entries]
        return after_X * (np.log(after_X) - log_q_X) - before_X * (np.log(np.maximum(before_X, 1)) - log_q_X)

    def kl_with(documents: np.ndarray) -> np.ndarray:
        """KL(chosen and one more document || pool) of some documents."""
        entries, starts = uses.entries_of(documents)
        total = chosen_tokens + uses.lengths_N[documents]
        return (chosen_sum + np.add.reduceat(added(entries), starts)) / total - np.log(total)

    left = np.arange(len(uses.lengths_N))
    own_kl_N = np.concatenate([kl_with(part) for part in np.array_split(left, -(-len(left) // BLOCK_DOCUMENTS))])
    while len(left):
        lengths = uses.lengths_N[left]
        share = lengths / (chosen_tokens + lengths)
        chosen_kl = chosen_sum / chosen_tokens - np.log(chosen_tokens) if chosen_tokens else 0.0
        # KL is convex, so that of a mixture is at most the mixture of both: who cannot win is not looked at.
        bounds = LENGTH_BONUS * lengths + (1 - share) * chosen_kl + share * own_kl_N[left]
        order = np.argsort(-bounds, kind="stable")
        best, winner = -np.inf, len(left)
        for start in range(0, len(order), BLOCK_DOCUMENTS):
            block = order[start : start + BLOCK_DOCUMENTS]
            if bounds[block[0]] < best - TIE:
                break
            scores = LENGTH_BONUS * lengths[block] + kl_with(left[block])
            if scores.max() > best + TIE:
                best, winner = float(scores.max()), len(left)
            winner = min([winner, *block[scores >= best - TIE].tolist()])
        document = int(left[winner])
        yield document
        entries = slice(uses.starts_N1[document], uses.starts_N1[document + 1])
        chosen_sum += float(added(entries).sum())
        chosen_tokens += int(lengths[winner])
        counts_U[uses.tokens_X[entries]] += uses.uses_X[entries]
        left = np.delete(left, winner)
