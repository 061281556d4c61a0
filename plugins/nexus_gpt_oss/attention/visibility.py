"""Which positions see which, said by a few numbers a token instead of a matrix of S x S.

# B sequences, S positions
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

# The document of padding: it sees only itself, and nothing that counts sees it.
PADDING = -1


@dataclass(frozen=True)
class Visibility:
    """A position sees itself and those before it, of its own document, at most window - 1 back.

    documents_BS: a number for each position, equal within a document, PADDING where there is none; None if each
    sequence is one document. Documents are contiguous. window: None for no end. made: what implementations made of it,
    for all layers that share this object.
    """

    documents_BS: torch.Tensor | None
    window: int | None
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def earliest(self) -> list[int] | None:
        """For each position the first that any sequence's position there can see by its document; None if all are 0."""
        if self.documents_BS is None:
            return None
        documents_BS = self.documents_BS
        positions_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
        begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
        begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
        starts_BS = torch.where(begins_BS, positions_S, 0).cummax(dim=1).values
        starts: list[int] = starts_BS.amin(dim=0).tolist()
        return starts

    def first_key(self, query: int) -> int:
        """The first key that the query at this position, or any after it, can see."""
        by_document = 0 if self.earliest is None else self.earliest[query]
        return by_document if self.window is None else max(by_document, query - self.window + 1)

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """Which pairs do not see each other: (1 or B, queries, keys)."""
        query_Q = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key_N = torch.arange(keys.start, keys.stop, device=device)
        hidden_QN = key_N > query_Q
        if self.window is not None:
            hidden_QN |= query_Q - key_N >= self.window
        if self.documents_BS is None:
            return hidden_QN[None]
        return hidden_QN | (self.documents_BS[:, queries, None] != self.documents_BS[:, None, keys])


def documents(position_ids_BS: torch.Tensor | None, mask_BS: torch.Tensor | None) -> torch.Tensor | None:
    """The documents of a batch, for `Visibility`. position_ids: a document begins wherever they don't go on by one.

    mask_BS: 0 where there is padding.
    """
    found = None
    if position_ids_BS is not None:
        breaks_BS = torch.zeros_like(position_ids_BS)
        breaks_BS[:, 1:] = position_ids_BS[:, 1:] - position_ids_BS[:, :-1] != 1
        found = breaks_BS.cumsum(dim=1)
    if mask_BS is None:
        return found
    if found is None:
        found = torch.zeros_like(mask_BS, dtype=torch.long)
    return found.masked_fill(mask_BS == 0, PADDING)
