"""The forward and backward passes of one optimizer step, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from nexus_core.data.mixture import Batch
from nexus_core.distill.head import OutputHead
from nexus_core.distill.signals import Signals, TokenCounts
from nexus_core.measure.router_health import RouterHealth
from nexus_core.processes import World, sum_in_place
from nexus_core.statistics.listening import Listener
from nexus_core.train.engines.engine import Engine
from nexus_core.train.passes import MicroBatch, TeacherSource, count_tokens, read_signals
from nexus_core.train.schedule import StepSettings
from nexus_core.train.selection_bias import SelectionBiases
from nexus_core.train.setup import Objective
from nexus_core.train.share import share_of


class Batches(Protocol):
    """Micro-batches by number, the same for the same number: `nexus_core.data.mixture.TrainingBatches`."""

    def batch(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class StepData:
    """This process's micro-batches of a step; of the whole step, all processes together, the tokens by what they are
    for, and how many places for tokens its rows have.
    """

    micro_batches: list[MicroBatch]
    tokens: TokenCounts
    places: int


@dataclass(frozen=True)
class Gradients:
    """Computes steps of a run. learnt: names of the sets to learn from; accumulation: micro-batches per step; isolates:
    whether the model keeps packed documents apart; selection_biases: told who was chosen, if a rule moves them; here:
    which share of every step is this process's.
    """

    engine: Engine
    head: OutputHead
    listener: Listener
    teacher: TeacherSource
    objective: Objective
    batches: Batches
    learnt: Collection[str]
    accumulation: int
    isolates: bool
    selection_biases: SelectionBiases | None
    here: World = World()  # noqa: RUF009 - a value that never changes

    def data(self, step: int) -> StepData:
        """That of a step, counted from 1."""
        first, device = (step - 1) * self.accumulation, self.head.weight.device
        batches = [self.batches.batch(first + i) for i in range(self.accumulation)]
        ours = share_of(batches, self.here.rank, self.here.size)
        micro_batches = [MicroBatch.of(batch, self.learnt, device, isolates=self.isolates) for batch in ours]
        everything = micro_batches
        if not self.here.alone:
            everything = [MicroBatch.of(batch, self.learnt, "cpu") for batch in batches]
        return StepData(micro_batches, count_tokens(everything), sum(batch.input_ids.numel() for batch in batches))

    def add(self, data: StepData, step_settings: StepSettings) -> dict[str, float]:
        """Forward, and backward where gradients are on; the whole step's loss, its parts and the routers' health."""
        device = self.head.weight.device
        router = RouterHealth()
        parts = {loss.name: torch.zeros((), device=device) for loss in self.objective.losses}
        total = torch.zeros((), device=device)
        for micro_batch in data.micro_batches:
            signals = read_signals(
                self.engine.model,
                self.head,
                self.listener,
                self.teacher,
                micro_batch,
                self.objective.needs,
                data.tokens,
                step_settings.temperature,
            )
            if self.selection_biases:
                self.selection_biases.count(self.listener, micro_batch.text)
            self.listener.clear()
            total += self._backward(signals, step_settings, parts, is_last=micro_batch is data.micro_batches[-1])
            router.update(signals.router_logits, signals.teacher_router_logits)
        sums = torch.stack([total, *parts.values()])
        if not self.here.alone:
            sum_in_place(sums)
            router.add_up(sum_in_place, len(self.listener.layers))
        values = dict(zip(["loss", *parts], sums.tolist(), strict=True))
        return values | router.summary()

    def _backward(
        self, signals: Signals, step_settings: StepSettings, parts: dict[str, torch.Tensor], *, is_last: bool
    ) -> torch.Tensor:
        """One micro-batch's weighted loss, added to the gradients; its parts are added to `parts`."""
        weighted = []
        for loss in self.objective.losses:
            part = loss(signals)
            parts[loss.name] += part.detach()
            weighted.append(loss.weight * (step_settings.kl_scale if loss.compares else 1.0) * part)
        micro_loss = torch.stack(weighted).sum()
        if micro_loss.requires_grad:
            self.engine.backward(micro_loss, is_last=is_last)
        return micro_loss.detach()
