"""Tokens of many passages at once, and which of them count in losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nexus_core.data.passages import Passage, Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tokenize(
    passages: Sequence[Passage | Written], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Of every passage its tokens, and which of them are learnt."""
    encoded = tokenizer(
        # The tokenizer refuses an empty list.
        ["", *(passage.text for passage in passages if isinstance(passage, Passage))],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    tokenized = zip(encoded["input_ids"][1:], encoded["offset_mapping"][1:], strict=True)
    for passage in passages:
        if isinstance(passage, Written):
            yield passage.tokens, np.array(passage.learns, dtype=bool)
        else:
            tokens, offsets = next(tokenized)
            yield tokens, learnt_tokens(passage, np.array(offsets))


def learnt_tokens(passage: Passage, offsets: np.ndarray) -> np.ndarray:
    """Which tokens (n,) touch a learnt character range. offsets (n, 2): each token's characters [start, end).

    Some tokenizers trim white space off offsets, so that a line break's are empty and lie at its end: it belongs to
    the range its end lies in.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    learns = np.zeros(len(offsets), dtype=bool)
    for start, end in passage.learnt:
        learns |= (ends > start) & ((starts < end) | (ends <= end))
    return learns
