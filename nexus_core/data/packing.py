"""Documents laid end to end and cut into sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nexus_core.data.documents import Document
from nexus_core.errors import DataError

# N sequences, S sequence length, n tokens of the whole stream

# What torch's cross entropy leaves out by default.
IGNORED = -100


@dataclass(frozen=True)
class PackedSequences:
    """input_ids (N, S) and targets (N, S), both int64: targets[:, t] is the token that follows input_ids[:, t].

    A target is -100 where nothing is to be learnt: a masked token, the first token of a document, padding. positions
    (N, S) int64: places in the document, from 0 where one begins or goes on in a new row. lengths (N,): real tokens
    per row; only rows at the end of the data are padded, on the right.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.lengths.sum())

    @property
    def learnt_tokens(self) -> int:
        """Targets that count in losses."""
        return int((self.targets != IGNORED).sum())


def pack(
    documents: Sequence[Document], sequence_length: int, *, end_token: int, limit_tokens: int | None = None
) -> PackedSequences:
    """The documents in the given order, each followed by `end_token`, cut every `sequence_length` tokens.

    A document goes on in the next sequence; the last sequence is padded with `end_token`. limit_tokens: no more
    than so many real tokens. Raises DataError if there are no documents.
    """
    if not documents:
        raise DataError("there are no documents to make sequences of; give data that has some")
    end = np.array([end_token], dtype=np.int32)
    stream = np.concatenate([part for document in documents for part in (document.tokens, end)])
    learns = np.concatenate([part for document in documents for part in (_learns(document), [document.learns_end])])
    # The very last end token is only ever predicted.
    inputs = len(stream) - 1 if limit_tokens is None else min(len(stream) - 1, limit_tokens)
    rows = -(-inputs // sequence_length)
    input_ids = np.full(rows * sequence_length, end_token, dtype=np.int64)
    targets = np.full(rows * sequence_length, IGNORED, dtype=np.int64)
    input_ids[:inputs] = stream[:inputs]
    targets[:inputs] = np.where(learns[1 : inputs + 1], stream[1 : inputs + 1], IGNORED)
    begins = np.arange(rows * sequence_length) % sequence_length == 0
    firsts = np.cumsum([len(document) + 1 for document in documents])
    begins[firsts[firsts < inputs]] = True
    places = np.arange(len(begins))
    positions = places - np.maximum.accumulate(np.where(begins, places, 0))
    lengths = np.full(rows, sequence_length, dtype=np.int64)
    lengths[-1] = inputs - (rows - 1) * sequence_length
    return PackedSequences(
        torch.from_numpy(input_ids.reshape(rows, sequence_length)),
        torch.from_numpy(targets.reshape(rows, sequence_length)),
        torch.from_numpy(positions.reshape(rows, sequence_length)),
        torch.from_numpy(lengths),
    )


def _learns(document: Document) -> np.ndarray:
    # What a document begins with cannot be told from the end of another one.
    learns = document.learns.copy()
    learns[0] = False
    return learns
