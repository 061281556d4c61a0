"""A few steps of every stage on a loaded model, timed: how fast collect, capture and train are, here and with it.

# B sequences, S tokens each
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nexus_core.additions import additions, as_teacher
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.mixture import TrainingBatches
from nexus_core.data.packing import PackedSequences
from nexus_core.recipe.training import Train
from nexus_core.stages.router_pass import RoutedBatch, RouterPass
from nexus_core.stages.teacher_pass import TeacherPass, Totals
from nexus_core.stages.train import training_objective
from nexus_core.statistics.kept_inputs import KeptInputs
from nexus_core.statistics.listening import listen
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.train.loop import fit

# Of these one is learnt and one kept, half of the rows each.
LEARNT, KEPT = "learnt", "kept"


@dataclass(frozen=True)
class Pace:
    """How fast a stage went. seconds: of one batch, the median. peak_bytes: of the GPU's memory, 0 on a CPU."""

    tokens_per_second: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """Runs stages of a loaded model over a few batches. packed: of at least batch_size * (steps + 1) sequences, all of
    the same length; steps: batches that count, after one that does not. clock: seconds.
    """

    checkpoint: Checkpoint
    model: Any
    packed: PackedSequences
    batch_size: int
    steps: int = 3
    clock: Callable[[], float] = time.perf_counter

    def collect(self, keep_inputs: int = 256) -> Pace:
        """As `collect` routes its tokens."""
        moe, device = self.checkpoint.description, self._device
        with ExitStack() as stack:
            model = stack.enter_context(as_teacher(self.model))
            listener = stack.enter_context(listen(model, self.checkpoint.family, keep_inputs=keep_inputs > 0))
            sums = RouterStatistics.zeros(moe.layers, moe.experts, device)
            kept = KeptInputs(moe.layers, self.packed.tokens, keep_inputs)
            router_pass = RouterPass(model, listener, sums, kept)
            return self._paced(
                router_pass.route,
                [
                    RoutedBatch(self.packed.input_ids[rows], self.packed.positions[rows], self._sets(rows))
                    for rows in self._rows()
                ],
            )

    def capture(self, settings: Train | None = None) -> Pace:
        """As `capture` reads and encodes a kept set."""
        wanted = (settings or Train()).model_copy(update={"batch_size": self.batch_size})
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            model = stack.enter_context(as_teacher(self.model))
            listener = stack.enter_context(listen(model, self.checkpoint.family))
            reader = TeacherPass(model, listener, wanted, self.checkpoint.description.vocabulary_size)

            def read(rows: slice) -> None:
                reader.read(self.packed, range(rows.start, rows.stop), True, Totals())

            return self._paced(read, list(self._rows()))

    def train(self, *, recomputes: bool, width: int | None = None) -> Pace:
        """As `train` takes steps of one micro-batch, half of it learnt; a base gets shared experts first, and keeps
        them. Nothing is written that stays.
        """
        if not additions(self.model):
            width = width or self.checkpoint.description.expert_width
            self.checkpoint.family.hook.nexus_attach_shared_expert(model=self.model, width=width)
        settings = Train.model_validate(
            {
                "max_steps": self.steps + 1,
                "batch_size": self.batch_size,
                "sequence_length": self.packed.input_ids.shape[1],
                "gradient_accumulation": 1,
                "gradient_checkpointing": recomputes,
                "checkpoint_every": self.steps + 2,
                "learning_rate": 1e-7,
            }
        )
        batches = TrainingBatches({LEARNT: self.packed, KEPT: self.packed}, {LEARNT: 1, KEPT: 1}, self.batch_size, 0)
        heard: list[float] = []

        def hear(step: int, values: Mapping[str, float]) -> None:
            heard.append(self.clock())
            if step > self.steps:
                # Before the loop saves a state that nobody wants.
                raise _Enough

        self._reset_peak()
        with tempfile.TemporaryDirectory() as folder:
            try:
                objective = training_objective(settings)
                fit(self.model, self.checkpoint.family, batches, settings, objective, {LEARNT}, Path(folder), hear)
            except _Enough:
                pass
        # From the end of the first step on: what came before is no step.
        return self._pace([after - before for before, after in pairwise(heard[1:])])

    def _paced(self, run: Callable[[Any], None], batches: list[Any]) -> Pace:
        seconds = []
        self._reset_peak()
        for batch in batches:
            started = self.clock()
            run(batch)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(self.clock() - started)
        return self._pace(seconds[1:])

    def _pace(self, seconds: list[float]) -> Pace:
        median = statistics.median(seconds)
        tokens = self.batch_size * self.packed.input_ids.shape[1]
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        return Pace(tokens / median, median, peak)

    def _rows(self) -> Iterator[slice]:
        for step in range(self.steps + 1):
            yield slice(step * self.batch_size, (step + 1) * self.batch_size)

    def _sets(self, rows: slice) -> torch.Tensor:
        is_text = torch.arange(self.packed.input_ids.shape[1]) < self.packed.lengths[rows, None]
        return torch.where(is_text, 0, -1).flatten()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


class _Enough(Exception):
    """The steps that were wanted have been taken."""


def random_sequences(vocabulary_size: int, count: int, length: int) -> PackedSequences:
    """Sequences of random tokens, always the same, each one document, for models without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_size, (count, length + 1), generator=generator)
    positions = torch.arange(length).expand(count, -1).contiguous()
    return PackedSequences(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, torch.full((count,), length)
    )


def repeated(packed: PackedSequences, count: int) -> PackedSequences:
    """At least `count` sequences: the same over and over, where there are fewer."""
    times = -(-count // max(len(packed), 1))
    if times <= 1:
        return packed
    return PackedSequences(
        packed.input_ids.repeat(times, 1),
        packed.targets.repeat(times, 1),
        packed.positions.repeat(times, 1),
        packed.lengths.repeat(times),
    )
