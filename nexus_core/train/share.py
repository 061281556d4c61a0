"""What of an optimizer step each of several processes computes.

A step is the same rows whatever the number of processes: they are dealt out, not added to. Rows do not see each other,
and losses divide by the step's tokens, so the sum of all processes' gradients is that of one.

    # B rows of a batch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from nexus_core.data.mixture import Batch
from nexus_core.data.packing import IGNORED


def share_of(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """The micro-batches of process `rank` of `size`: as many as every other's, none with more rows than the given.

    Processes get the same number of rows, or one less. One that has no row left for a micro-batch gets a row in which
    nothing counts, because sharded models run a pass on all processes or on none.
    """
    if size == 1:
        return list(batches)
    rows, most = sum(len(batch.lengths) for batch in batches), max(len(batch.lengths) for batch in batches)
    passes = math.ceil(math.ceil(rows / size) / most)
    ours = _cut(range(rows), size)[rank]
    return [_take(batches, part) if part else _silent(batches[0]) for part in _cut(ours, passes)]


def _cut(numbers: range, parts: int) -> list[range]:
    """Consecutive parts of the same length, the first ones longer by one where it does not come out even."""
    length, longer = divmod(len(numbers), parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return [numbers[start:end] for start, end in pairwise(starts)]


def _take(batches: Sequence[Batch], rows: range) -> Batch:
    """Those rows of all batches laid end to end."""
    pieces, first = [], 0
    for batch in batches:
        last = first + len(batch.lengths)
        piece = slice(max(rows.start, first) - first, max(min(rows.stop, last) - first, 0))
        if piece.start < piece.stop:
            pieces.append((batch, piece))
        first = last
    tensors = {
        name: torch.cat([getattr(batch, name)[piece] for batch, piece in pieces])
        for name in ("input_ids", "targets", "positions", "lengths")
    }
    names = [name for batch, piece in pieces for name in batch.set_names[piece]]
    return Batch(**tensors, set_names=names, places=[place for batch, piece in pieces for place in batch.places[piece]])


def _silent(like: Batch) -> Batch:
    """A row of padding; it has no place in the data."""
    return Batch(
        like.input_ids[:1],
        torch.full_like(like.targets[:1], IGNORED),
        like.positions[:1],
        torch.zeros_like(like.lengths[:1]),
        like.set_names[:1],
    )
