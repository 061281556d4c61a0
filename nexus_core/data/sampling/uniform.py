"""Documents by lot: what every other strategy is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nexus_core.data.documents import Document


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
