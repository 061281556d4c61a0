"""What became of the records of a data source."""

from __future__ import annotations

from dataclasses import dataclass, field

# A document of one token has nothing to predict.
SHORTEST_DOCUMENT = 2


@dataclass
class SourceReport:
    """What became of one source's records, so that nothing is left out in silence.

    records: read, of which `other_part` belong to the other part of the split and the next six could not be used;
    first_problem is one of the unreadable ones' errors. oversize: used, but only their beginning. documents, tokens:
    what was made of the rest; a conversation may give several. passes: how often it was read to its end. unread:
    characters by field that plain text was not read from, where nobody had said which field is the text.
    """

    path: str
    format: str = ""
    records: int = 0
    other_part: int = 0
    empty: int = 0
    too_short: int = 0
    missing_prompt: int = 0
    nothing_to_learn: int = 0
    unreadable: int = 0
    first_problem: str = ""
    too_long: int = 0
    oversize: int = 0
    documents: int = 0
    tokens: int = 0
    passes: int = 0
    characters: int = 0
    unread: dict[str, int] = field(default_factory=dict)

    def left_out(self) -> str:
        """What was left out and why, in a few words; empty if nothing was."""
        counts = {
            "empty": self.empty,
            f"shorter than {SHORTEST_DOCUMENT} tokens": self.too_short,
            "without a prompt": self.missing_prompt,
            "without anything to learn": self.nothing_to_learn,
            "too long": self.too_long,
            "unreadable": self.unreadable,
        }
        parts = [f"{count:,} {reason}" for reason, count in counts.items() if count]
        return ", ".join(parts) + (f" ({self.first_problem})" if self.unreadable else "")

    def passed_by(self) -> str:
        """The fields that hold more text together than the one that was read; empty if there are none."""
        fields = sorted(self.unread, key=lambda name: -self.unread[name])
        return ", ".join(fields) if sum(self.unread.values()) > self.characters else ""
