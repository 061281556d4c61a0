"""Documents that together use the vocabulary as their pool does."""

# N documents, P pairs of a token and a number of uses, U different tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nexus_core.data.documents import Document
from nexus_core.data.sampling.uses import TokenUses, ranges, token_uses

# Documents whose gains are computed in one go: fewer waste time between calls, more compute gains nobody asked for.
BLOCK_DOCUMENTS = 96

# Documents are put in order of their gains anew when, since the last time, this many gains per document were computed.
GAINS_PER_ORDER = 8

# Gains nearer than this to each other are equal: the order of a sum must not decide.
TIE = 1e-12


def coverage(
    documents: Sequence[Document], tokens: int, vocabulary_size: int, generator: np.random.Generator
) -> Iterator[int]:
    """Indices of documents that together use the vocabulary as the pool does, greedily chosen by gain per token.

    With n the token counts of what has been chosen and q the pool's frequencies, the value of a choice is

        sum over tokens t of sqrt(q_t * n_t)

    the Hellinger affinity to the pool but for the scale, and the next document is the one that adds the most to it per
    token of its own: otherwise the longest win, whatever they say. Ties go to the document that comes first.
    """
    indices = np.array([index for index, document in enumerate(documents) if len(document)], dtype=np.int64)
    if not len(indices):
        return
    left = tokens
    for place in CoverageGreedy(token_uses([documents[index] for index in indices])):
        if left <= 0:
            return
        index = int(indices[place])
        yield index
        left -= len(documents[index])


class CoverageGreedy(Iterator[int]):
    """The documents of a pool in the order in which the greedy choice takes them, exactly.

    The value is concave in every count, so what a document adds only shrinks as others are taken, and a gain computed
    earlier is an upper bound (Minoux 1978): only documents whose bound reaches the best gain have to be looked at
    again. Here they are looked at in blocks of documents that had about the same gain, one block a pair of numpy calls.

    evaluations: gains computed so far, each over all the different tokens of one document.
    """

    def __init__(self, uses: TokenUses):
        self.uses = uses
        self.evaluations = 0
        self._root_P = np.sqrt(uses.frequency_U)[uses.pair_tokens_P]
        self._counts_U = np.zeros(len(uses.frequency_U))
        self._gains_P = self._root_P * np.sqrt(uses.pair_uses_P)
        everything = np.arange(len(uses.lengths_N))
        entries, starts = uses.entries_of(everything)
        self._put_in_order(everything, self._gains(uses.pairs_X[entries], starts) / uses.lengths_N)

    def __next__(self) -> int:
        if self._evaluations_in_order > GAINS_PER_ORDER * len(self._order):
            left = self._weights > 0
            self._put_in_order(self._order[left], self._bounds[left])
        place, document = self._best()
        self._take(document)
        block = place // BLOCK_DOCUMENTS
        self._weights[place] = self._bounds[place] = 0.0
        self._block_bounds[block] = self._bounds[self._slices[block]].max()
        return document

    def _put_in_order(self, documents: np.ndarray, bounds: np.ndarray) -> None:
        """Documents not yet taken into blocks, by the bounds of their gains per token."""
        order = np.lexsort((documents, -bounds))
        self._order, self._bounds = documents[order], bounds[order]
        self._weights = 1 / self.uses.lengths_N[self._order]  # 0 once a document is taken
        self._slices = [slice(start, start + BLOCK_DOCUMENTS) for start in range(0, len(self._order), BLOCK_DOCUMENTS)]
        # What a block's gains are computed from; gathered when it is first looked at, for most never are.
        self._pairs: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(self._slices)
        self._block_bounds = self._bounds[::BLOCK_DOCUMENTS].copy()
        self._evaluations_in_order = 0

    def _best(self) -> tuple[int, int]:
        """Place and number of the document of the largest gain, of equals the first one's.

        Raises StopIteration if all are taken.
        """
        bounds = self._block_bounds
        best, looked_at = 0.0, []
        while len(bounds):
            block = int(bounds.argmax())
            if bounds[block] <= 0 or bounds[block] < best * (1 - TIE):
                break
            largest = self._look_at(block)
            looked_at.append((block, largest))
            bounds[block] = -1.0  # not twice for one choice
            best = max(best, largest)
        if best <= 0:
            raise StopIteration
        threshold = best * (1 - TIE)
        equals: list[tuple[int, int]] = []
        for block, largest in looked_at:
            bounds[block] = largest
            if largest >= threshold:
                places = np.flatnonzero(self._bounds[self._slices[block]] >= threshold) + block * BLOCK_DOCUMENTS
                equals += zip(self._order[places].tolist(), places.tolist(), strict=True)
        document, place = min(equals)
        return place, document

    def _look_at(self, block: int) -> float:
        """Compute a block's gains anew and return the largest."""
        part = self._slices[block]
        gathered = self._pairs[block]
        if gathered is None:
            entries, starts = self.uses.entries_of(self._order[part])
            # As the index type, or every look-up would convert them first.
            gathered = self._pairs[block] = (self.uses.pairs_X[entries].astype(np.intp), starts)
        gains = self._gains(*gathered)
        self._evaluations_in_order += len(gains)
        return float(np.multiply(gains, self._weights[part], out=self._bounds[part]).max())

    def _gains(self, pairs: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """What each of some documents would add to the value, given their entries' pairs."""
        self.evaluations += len(starts)
        # "clip" skips a check of every index.
        return np.add.reduceat(self._gains_P.take(pairs, mode="clip"), starts)

    def _take(self, document: int) -> None:
        """Count a document's tokens, and compute the gains of all pairs of these tokens anew."""
        uses = self.uses
        entries = slice(uses.starts_N1[document], uses.starts_N1[document + 1])
        tokens = uses.tokens_X[entries]
        counts = self._counts_U[tokens] + uses.uses_X[entries]
        self._counts_U[tokens] = counts

        begins = uses.pair_starts_U1[tokens]
        sizes = uses.pair_starts_U1[tokens + 1] - begins
        pairs = ranges(begins, sizes)
        after = np.sqrt(np.repeat(counts, sizes) + uses.pair_uses_P[pairs])
        self._gains_P[pairs] = self._root_P[pairs] * (after - np.repeat(np.sqrt(counts), sizes))
