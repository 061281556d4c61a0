"""The text of a record, or its tokens, with the part that is to be learnt: what a data format makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus_core.errors import DataError


@dataclass(frozen=True)
class Passage:
    """One piece of text, and the character ranges [start, end) of it that count in losses.

    learns_end: whether the end of the document that follows the text counts too.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]
    learns_end: bool = True

    def cut(self, characters: int) -> Passage:
        """The beginning of it; what is learnt beyond goes too, and so does its end."""
        learnt = tuple((start, min(end, characters)) for start, end in self.learnt if start < characters)
        return Passage(self.text[:characters], learnt, learns_end=False)


@dataclass(frozen=True)
class Written:
    """Text that is tokens already, as a model wrote it: to tokenize it again could give others.

    text: the same for people. tokens: ids; learns: which of them count in losses, of the same length. learns_end:
    whether the end of the document that follows counts too.
    """

    text: str
    tokens: Sequence[int]
    learns: Sequence[bool]
    learns_end: bool = False

    def cut(self, characters: int) -> Written:
        """The whole of it: how much of it a model was to write was said when it wrote."""
        return self


class MissingPromptError(DataError):
    """A record that answers a question it does not hold, so that nothing is to be learnt from its answer."""
