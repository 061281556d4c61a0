"""A part of the work that another process or machine does the rest of."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nexus_core.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Number `number` of `count` equal parts, from 1, in the order of the data; written `2/4`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, batches: int) -> tuple[int, int]:
        """The first batch of this part and the one behind its last. Raises UsageError if there is none for it."""
        first, last = (batches * part // self.count for part in (self.number - 1, self.number))
        if first == last:
            raise UsageError(
                f"shard {self}: there are only {batches} batches; take fewer shards, or a smaller batch_size"
            )
        return first, last


WHOLE = Shard(1, 1)


def read_shard(text: str) -> Shard:
    """A shard as it is written on the command line. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {text}: write NUMBER/COUNT, for example 1/4 for the first of four")
    return Shard(int(found[1]), int(found[2]))
