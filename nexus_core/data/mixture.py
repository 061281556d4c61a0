"""Batches of packed sequences in which every data set has its share, addressed by number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from nexus_core.data.packing import PackedSequences
from nexus_core.errors import DataError, suggestion

# B sequences per batch, S sequence length

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Batch:
    """input_ids, targets, positions (B, S) and lengths (B,) as in PackedSequences; of each row its set's name and its
    place, which of that set's sequences it is.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    set_names: list[str]
    places: list[int] = field(default_factory=list)


class TrainingBatches:
    """An endless mix of data sets: row after row, the set that is furthest behind its share gives the next one.

    So the rows drawn so far never miss a share by more than a row or two, in any batch. Each set is gone through in
    a new random order every time. A batch depends on its number alone, so training resumes by counting on.
    Raises DataError if a share names a set that is not there.
    """

    def __init__(self, sets: Mapping[str, PackedSequences], shares: Mapping[str, float], batch_size: int, seed: int):
        for name in shares:
            if name not in sets:
                raise DataError(f"there is no data set '{name}'{suggestion(name, sets)}")
        self.names = [name for name, share in shares.items() if share > 0]
        if not self.names:
            raise DataError("no data set has a share above 0; give at least one")
        self.sets = [sets[name] for name in self.names]
        self.batch_size, self.seed = batch_size, seed
        weights = np.array([shares[name] for name in self.names], dtype=np.float64)
        self.shares = weights / weights.sum()
        self._set_of_row = np.empty(0, dtype=np.int64)
        self._draw_of_row = np.empty(0, dtype=np.int64)
        self._drawn = np.zeros(len(self.names), dtype=np.int64)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`, from 0."""
        rows = range(index * self.batch_size, (index + 1) * self.batch_size)
        self._plan(rows.stop)
        places = [self._place(int(self._set_of_row[row]), int(self._draw_of_row[row])) for row in rows]
        return Batch(
            torch.stack([self.sets[number].input_ids[place] for number, place in places]),
            torch.stack([self.sets[number].targets[place] for number, place in places]),
            torch.stack([self.sets[number].positions[place] for number, place in places]),
            torch.stack([self.sets[number].lengths[place] for number, place in places]),
            [self.names[number] for number, _ in places],
            [place for _, place in places],
        )

    def _plan(self, rows: int) -> None:
        """Decide which set every row up to `rows` comes from."""
        while len(self._set_of_row) < rows:
            first = len(self._set_of_row)
            numbers, draws = np.empty(_ROWS_AT_ONCE, np.int64), np.empty(_ROWS_AT_ONCE, np.int64)
            for offset in range(_ROWS_AT_ONCE):
                # argmax takes the first of equals, so ties go by the order in which the recipe names the sets
                number = int(np.argmax(self.shares * (first + offset + 1) - self._drawn))
                numbers[offset], draws[offset] = number, self._drawn[number]
                self._drawn[number] += 1
            self._set_of_row = np.concatenate([self._set_of_row, numbers])
            self._draw_of_row = np.concatenate([self._draw_of_row, draws])

    def _place(self, number: int, draw: int) -> tuple[int, int]:
        """Which sequence of a set its draw number `draw` is."""
        epoch, place = divmod(draw, len(self.sets[number]))
        known_epoch, order = self._orders.get(number, (-1, np.empty(0)))
        if known_epoch != epoch:
            order = np.random.default_rng([self.seed, number, epoch]).permutation(len(self.sets[number]))
            self._orders[number] = (epoch, order)
        return number, int(order[place])
