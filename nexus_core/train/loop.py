"""The training loop: one process, one copy of the model, every step a function of the seed and the step's number.

Losses, schedule, routing, optimizer and checkpoints live in files of their own; this one puts them together.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from nexus_core.data.mixture import Batch
from nexus_core.errors import TrainingError
from nexus_core.measure.router_health import RouterHealth
from nexus_core.plugins import Family
from nexus_core.progress import Progress
from nexus_core.recipe import schema
from nexus_core.statistics.listening import Listener, listen
from nexus_core.train.checkpoints import newest_position, write_position
from nexus_core.train.health import Health
from nexus_core.train.journal import Journal
from nexus_core.train.optimizer import Optimizer
from nexus_core.train.passes import MicroBatch, count_tokens, read_signals
from nexus_core.train.schedule import Schedule, StepSettings
from nexus_core.train.setup import Objective, ready_parameters, recompute_activations

JOURNAL_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"

Report = Callable[[int, Mapping[str, float]], None]


class Batches(Protocol):
    """Micro-batches by number, the same for the same number: `nexus_core.data.mixture.TrainingBatches`."""

    def batch(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class Trained:
    """The end of a run: parameters by name as the model has them, and the journal of all steps."""

    parameters: dict[str, nn.Parameter]
    journal: Journal


def fit(
    model: nn.Module,
    family: Family,
    batches: Batches,
    settings: schema.Train,
    objective: Objective,
    learnt: Collection[str],
    folder: Path,
    report: Report = lambda step, values: None,
) -> Trained:
    """Train the model's additions in place, going on from the newest checkpoint in `folder` if there is one.

    objective: losses and routing. learnt: names of the data sets to learn from; all others are kept. folder: gets
    metrics.jsonl and checkpoints/. report: called with every row of metrics.jsonl. The same settings, data and model
    give the same bits, also after an interruption. Raises TrainingError if the loss or the gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, family, batches, settings, objective, learnt, folder, report)
    try:
        with listen(model, family) as listener:
            run.go(listener)
    finally:
        run.optimizer.close()
    return Trained(run.parameters, run.journal)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        family: Family,
        batches: Batches,
        settings: schema.Train,
        objective: Objective,
        learnt: Collection[str],
        folder: Path,
        report: Report,
    ):
        self.model, self.batches, self.settings = model.eval(), batches, settings
        self.learnt, self.report = frozenset(learnt), report
        self.device = next(model.parameters()).device
        self.objective = objective
        self.schedule = Schedule.of(settings)
        groups = ready_parameters(model, family, objective, settings.schedule.bias_lr_multiplier)
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.optimizer = Optimizer(groups, weight_decay=settings.weight_decay)
        if settings.gradient_checkpointing:
            recompute_activations(model)
        self.journal = Journal(folder / JOURNAL_NAME)
        self.checkpoints = folder / CHECKPOINTS_NAME
        self.health = Health(lambda warning: print(f"warning: train: {warning}", file=sys.stderr))
        self.last_good = "no checkpoint was written yet"

    def go(self, listener: Listener) -> None:
        done = self._resume()
        if done == 0:
            self._record(0, self._before_the_first_step(listener))
        with Progress("train", self.settings.max_steps, "steps") as progress:
            progress.resume_at(done)
            for step in range(done + 1, self.settings.max_steps + 1):
                values = self._step(step, listener)
                self._record(step, values)
                self.health.watch(step, values)
                if step % self.settings.checkpoint_every == 0 or step == self.settings.max_steps:
                    self._write_checkpoint(step)
                progress.advance(1, f"loss {values['loss']:.3f}")

    def _resume(self) -> int:
        position = newest_position(self.checkpoints)
        self.journal.cut_after(position.step if position else -1)
        if position is None:
            return 0
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(position.trainables[name])
        self.optimizer.load_state_tensors(position.optimizer)
        self.last_good = f"the last good checkpoint is {position.folder}"
        print(f"train: going on after step {position.step:,} from {position.folder}", file=sys.stderr)
        return position.step

    def _write_checkpoint(self, step: int) -> None:
        folder = write_position(
            self.checkpoints,
            step,
            self.parameters,
            self.optimizer.state_tensors(),
            {"max_steps": self.settings.max_steps, "next_batch": step * self.settings.gradient_accumulation},
            keep=self.settings.keep_checkpoints,
        )
        self.last_good = f"the last good checkpoint is {folder}"

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        self.journal.write(step, values)
        self.report(step, values)

    def _before_the_first_step(self, listener: Listener) -> dict[str, float]:
        """Losses of the untrained model on the first step's data: where the run starts from."""
        with torch.no_grad():
            return self._gradients(self._micro_batches(1), self.schedule.at(1), listener)

    def _step(self, step: int, listener: Listener) -> dict[str, float]:
        started = time.perf_counter()
        step_settings = self.schedule.at(step)
        micro_batches = self._micro_batches(step)
        values = self._gradients(micro_batches, step_settings, listener)
        if not math.isfinite(values["loss"]):
            raise self._stopped(step, f"the loss is {values['loss']}")
        try:
            norm = self.optimizer.step(
                step_settings.learning_rate,
                max_gradient_norm=self.settings.max_gradient_norm,
                router_learns=step_settings.router_learns,
            )
        except TrainingError as error:
            raise self._stopped(step, str(error)) from None
        seconds = time.perf_counter() - started
        tokens = sum(micro_batch.input_ids.numel() for micro_batch in micro_batches)
        return values | {
            "learning_rate": step_settings.learning_rate,
            "temperature": step_settings.temperature,
            "gradient_norm": norm,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        first = (step - 1) * self.settings.gradient_accumulation
        return [
            MicroBatch.of(self.batches.batch(first + i), self.learnt, self.device)
            for i in range(self.settings.gradient_accumulation)
        ]

    def _gradients(
        self, micro_batches: list[MicroBatch], step_settings: StepSettings, listener: Listener
    ) -> dict[str, float]:
        """Forward, and backward where gradients are on; the step's loss, its parts and the routers' health."""
        step_tokens = count_tokens(micro_batches)
        router = RouterHealth()
        parts = {loss.name: torch.zeros((), device=self.device) for loss in self.objective.losses}
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            signals = read_signals(
                self.model, listener, micro_batch, self.objective.needs, step_tokens, step_settings.temperature
            )
            weighted = []
            for loss in self.objective.losses:
                part = loss(signals)
                parts[loss.name] += part.detach()
                weighted.append(loss.weight * (step_settings.kl_scale if loss.compares else 1.0) * part)
            micro_loss = torch.stack(weighted).sum()
            if micro_loss.requires_grad:
                micro_loss.backward()
            total += micro_loss.detach()
            router.update(signals.router_logits, signals.teacher_router_logits)
        values = {"loss": float(total), **{name: float(part) for name, part in parts.items()}}
        return values | router.summary()

    def _stopped(self, step: int, reason: str) -> TrainingError:
        return TrainingError(
            f"train stopped at step {step}: {reason}; {self.last_good}. Lower train.learning_rate (now "
            f"{self.settings.learning_rate:g}) or train.max_gradient_norm, or raise train.schedule.warmup_ratio"
        )
