"""Documents end to end in sequences of one length: what is predicted where, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from nexus_core.data.documents import Document
from nexus_core.data.packing import IGNORED, pack
from nexus_core.errors import DataError

END = 99


def document(tokens: list[int], learns: list[int] | None = None, *, learns_end: bool = True) -> Document:
    learnt = np.ones(len(tokens), bool) if learns is None else np.array(learns, bool)
    return Document(np.array(tokens, np.int32), learnt, "a.jsonl", learns_end)


def test_targets_are_the_next_tokens_over_sequence_boundaries_but_not_over_documents():
    packed = pack([document([1, 2, 3, 4]), document([5, 6])], 3, end_token=END)
    assert packed.input_ids.tolist() == [[1, 2, 3], [4, END, 5], [6, END, END]]
    #                                     2  3  4 | 4's follower is the end; after it comes another document's first
    assert packed.targets.tolist() == [[2, 3, 4], [END, IGNORED, 6], [END, IGNORED, IGNORED]]
    assert packed.positions.tolist() == [[0, 1, 2], [0, 1, 0], [0, 1, 2]]
    assert packed.lengths.tolist() == [3, 3, 1]
    assert (packed.tokens, packed.learnt_tokens, len(packed)) == (7, 6, 3)


def test_masked_tokens_and_unlearnt_ends_are_no_targets():
    packed = pack([document([1, 2, 3, 4], [0, 0, 1, 0], learns_end=False), document([5, 6])], 8, end_token=END)
    assert packed.targets.tolist() == [[IGNORED, 3, IGNORED, IGNORED, IGNORED, 6, END, IGNORED]]


def test_limit_cuts_the_last_sequence_and_keeps_its_last_target():
    packed = pack([document([1, 2, 3, 4, 5, 6, 7])], 3, end_token=END, limit_tokens=5)
    assert packed.input_ids.tolist() == [[1, 2, 3], [4, 5, END]]
    assert packed.targets.tolist() == [[2, 3, 4], [5, 6, IGNORED]]
    assert packed.tokens == 5


def test_exactly_full_sequences_have_no_padding():
    packed = pack([document([1, 2, 3])], 3, end_token=END)
    assert packed.input_ids.tolist() == [[1, 2, 3]]
    assert packed.targets.tolist() == [[2, 3, END]]


def test_against_an_obvious_version_on_random_documents():
    generator = np.random.default_rng(0)
    documents = [
        document(
            generator.integers(1, 90, size=size).tolist(),
            generator.integers(0, 2, size=size).tolist(),
            learns_end=bool(generator.integers(2)),
        )
        for size in generator.integers(2, 40, size=50)
    ]
    stream: list[tuple[int, bool]] = []
    for item in documents:
        for place, token in enumerate(item.tokens.tolist()):
            stream.append((token, bool(item.learns[place]) and place > 0))
        stream.append((END, item.learns_end))
    packed = pack(documents, 16, end_token=END)
    assert packed.tokens == len(stream) - 1
    for place, (token, (follower, learnt)) in enumerate(zip((pair[0] for pair in stream), stream[1:], strict=False)):
        assert packed.input_ids[place // 16, place % 16] == token
        assert packed.targets[place // 16, place % 16] == (follower if learnt else IGNORED)


def test_no_documents_are_refused():
    with pytest.raises(DataError, match="no documents"):
        pack([], 8, end_token=END)
