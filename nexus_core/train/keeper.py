"""Keeps on disk where a run stands, and takes it up again, whatever its engine and the number of its processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.processes import together
from nexus_core.train.anchor import Anchor
from nexus_core.train.checkpoints import Position, newest_position, write_position
from nexus_core.train.engines.engine import Engine

CHECKPOINTS_NAME = "checkpoints"
BEST_NAME = "best"


class Keeper:
    """The checkpoints of a run in `folder`, the newest `keep` of them, and its best state. The first process writes.

    parameters: what learns, by name.
    """

    def __init__(
        self, folder: Path, engine: Engine, parameters: Mapping[str, nn.Parameter], anchor: Anchor | None, *, keep: int
    ):
        self._checkpoints, self._best = folder / CHECKPOINTS_NAME, folder / BEST_NAME
        self._engine, self._parameters, self._anchor, self._keep = engine, parameters, anchor, keep
        self.last_good = "no checkpoint was written yet"

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step."""
        state = self._engine.state_tensors() | (self._anchor.state_tensors() if self._anchor else {})
        whole = self._engine.whole(self._parameters)
        keep = self._keep
        folder = together(lambda: str(write_position(self._checkpoints, step, whole, state, record, keep=keep)))
        self.last_good = f"the last good checkpoint is {folder}"

    def take_up(self) -> Position | None:
        """Put the newest checkpoint that can be read into model, optimizer and anchor; None if there is none."""
        position = _newest(self._checkpoints)
        if position is not None:
            self._engine.load(position.trainables)
            self._engine.load_state_tensors(position.optimizer)
            if self._anchor:
                self._anchor.load_state_tensors(position.optimizer)
            self.last_good = f"the last good checkpoint is {position.folder}"
        return position

    def write_best(self, step: int, score: float) -> None:
        """Keep this state as the best so far."""
        whole = self._engine.whole(self._parameters)
        together(lambda: str(write_position(self._best, step, whole, {}, {"score": score}, keep=1)))

    def take_best(self) -> int:
        """Put the best state into the model; returns its step. Raises TrainingError if it cannot be read."""
        position = _newest(self._best)
        if position is None:
            raise TrainingError(f"{self._best}: the best state cannot be read")
        self._engine.load(position.trainables)
        return position.step


def _newest(folder: Path) -> Position | None:
    """As the first process sees it, so that all take the same."""

    def find() -> str | None:
        position = newest_position(folder)
        return None if position is None else str(position.folder)

    found = together(find)
    return None if found is None else Position.read(Path(found))
