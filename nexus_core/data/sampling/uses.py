"""How often every document of a pool uses each token, laid out so that many documents' sums are one look-up."""

# N documents, U different tokens of the pool, P pairs of a token and a number of uses, X entries (one per document and
# different token in it)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexus_core.data.documents import Document


@dataclass(frozen=True)
class TokenUses:
    """The token counts of every document of a pool. Tokens are numbered anew, 0 to U - 1, the most frequent first.

    So what belongs to the few that most entries are of lies together, and in the processor's cache.

    lengths_N: tokens of each document. starts_N1: where each document's entries begin, and where the last one's end.
    tokens_X, uses_X: a token of the document and how often it stands there, tokens ascending within a document.
    pairs_X: the entry's pair. Documents share few pairs (a token and its number of uses) among many entries, so that a
    value per pair, looked up by entry, is how gains are computed. pair_tokens_P, pair_uses_P: the pairs, those of one
    token next to each other, from pair_starts_U1 on. frequency_U: share of each token in the pool.
    """

    lengths_N: np.ndarray
    starts_N1: np.ndarray
    tokens_X: np.ndarray
    uses_X: np.ndarray
    pairs_X: np.ndarray
    pair_tokens_P: np.ndarray
    pair_uses_P: np.ndarray
    pair_starts_U1: np.ndarray
    frequency_U: np.ndarray

    def entries_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the entries of some documents, one after the other, and where each one's begin among them."""
        begins, counts = self.starts_N1[documents], self.starts_N1[documents + 1] - self.starts_N1[documents]
        return ranges(begins, counts), np.cumsum(counts) - counts


def token_uses(documents: Sequence[Document]) -> TokenUses:
    """The token counts of a pool of documents, none of which is empty."""
    from scipy.sparse import csr_array

    lengths_N = np.array([len(document) for document in documents], dtype=np.int64)
    tokens = np.concatenate([document.tokens for document in documents])
    pool_V = np.bincount(tokens)
    by_frequency_U = np.argsort(-pool_V, kind="stable")[: np.count_nonzero(pool_V)]
    number_V = np.empty(len(pool_V), dtype=np.int32)
    number_V[by_frequency_U] = np.arange(len(by_frequency_U))
    renumbered = number_V[tokens]
    starts = np.concatenate([[0], np.cumsum(lengths_N)])
    shape = (len(lengths_N), len(by_frequency_U))
    # Adding up a sparse matrix's repeated entries is the quickest count by document there is without a compiler.
    counts = csr_array((np.ones(len(tokens), dtype=np.int32), renumbered, starts), shape=shape)
    counts.sum_duplicates()
    tokens_X, uses_X = counts.indices, counts.data

    # Every token has its own stretch of pairs, of as many as it is used at most; then those that occur are kept.
    most_U = np.zeros(shape[1], dtype=np.int64)
    np.maximum.at(most_U, tokens_X, uses_X)
    stretches_U1 = np.concatenate([[0], np.cumsum(most_U)])
    place_X = stretches_U1[tokens_X] + uses_X - 1
    occurs = np.zeros(stretches_U1[-1], dtype=bool)
    occurs[place_X] = True
    pair_starts_U1 = np.concatenate([[0], np.cumsum(occurs)])[stretches_U1]
    pair_tokens_P = np.repeat(np.arange(shape[1]), np.diff(pair_starts_U1))
    return TokenUses(
        lengths_N=lengths_N,
        starts_N1=counts.indptr.astype(np.int64),
        tokens_X=tokens_X,
        uses_X=uses_X,
        pairs_X=(np.cumsum(occurs) - 1).astype(np.int32)[place_X],
        pair_tokens_P=pair_tokens_P,
        pair_uses_P=np.flatnonzero(occurs) - stretches_U1[pair_tokens_P] + 1,
        pair_starts_U1=pair_starts_U1,
        frequency_U=pool_V[by_frequency_U] / len(tokens),
    )


def ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... counts[0] of them, then the same of the next."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
