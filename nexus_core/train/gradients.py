"""The forward and backward passes of one optimizer step, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from nexus_core.data.mixture import Batch
from nexus_core.distill.head import OutputHead
from nexus_core.distill.signals import Signals
from nexus_core.measure.router_health import RouterHealth
from nexus_core.statistics.listening import Listener
from nexus_core.train.passes import MicroBatch, TeacherSource, count_tokens, read_signals
from nexus_core.train.schedule import StepSettings
from nexus_core.train.selection_bias import SelectionBiases
from nexus_core.train.setup import Objective


class Batches(Protocol):
    """Micro-batches by number, the same for the same number: `nexus_core.data.mixture.TrainingBatches`."""

    def batch(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class Gradients:
    """Computes steps of a run. learnt: names of the sets to learn from; accumulation: micro-batches per step; isolates:
    whether the model keeps packed documents apart; selection_biases: told who was chosen, if a rule moves them.
    """

    model: nn.Module
    head: OutputHead
    listener: Listener
    teacher: TeacherSource
    objective: Objective
    batches: Batches
    learnt: Collection[str]
    accumulation: int
    isolates: bool
    selection_biases: SelectionBiases | None

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Those of a step, counted from 1."""
        first, device = (step - 1) * self.accumulation, self.head.weight.device
        return [
            MicroBatch.of(self.batches.batch(first + i), self.learnt, device, isolates=self.isolates)
            for i in range(self.accumulation)
        ]

    def add(self, micro_batches: list[MicroBatch], step_settings: StepSettings) -> dict[str, float]:
        """Forward, and backward where gradients are on; the step's loss, its parts and the routers' health."""
        step_tokens, device = count_tokens(micro_batches), self.head.weight.device
        router = RouterHealth()
        parts = {loss.name: torch.zeros((), device=device) for loss in self.objective.losses}
        total = torch.zeros((), device=device)
        for micro_batch in micro_batches:
            signals = read_signals(
                self.model,
                self.head,
                self.listener,
                self.teacher,
                micro_batch,
                self.objective.needs,
                step_tokens,
                step_settings.temperature,
            )
            if self.selection_biases:
                self.selection_biases.count(self.listener, micro_batch.text)
            total += self._backward(signals, step_settings, parts)
            router.update(signals.router_logits, signals.teacher_router_logits)
        values = {"loss": float(total), **{name: float(part) for name, part in parts.items()}}
        return values | router.summary()

    def _backward(self, signals: Signals, step_settings: StepSettings, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """One micro-batch's weighted loss, added to the gradients; its parts are added to `parts`."""
        weighted = []
        for loss in self.objective.losses:
            part = loss(signals)
            parts[loss.name] += part.detach()
            weighted.append(loss.weight * (step_settings.kl_scale if loss.compares else 1.0) * part)
        micro_loss = torch.stack(weighted).sum()
        if micro_loss.requires_grad:
            micro_loss.backward()
        return micro_loss.detach()
