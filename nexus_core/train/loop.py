"""The training loop: one process, one copy of the model, every step a function of the seed and the step's number.

Losses, schedule, routing, optimizer, evaluation and checkpoints live in files of their own; this one puts them
together.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nexus_core.data.isolation import isolates_documents
from nexus_core.errors import TrainingError
from nexus_core.plugins import Family
from nexus_core.progress import Progress
from nexus_core.recipe.training import Train
from nexus_core.statistics.listening import Listener, listen
from nexus_core.train.anchor import Anchor
from nexus_core.train.checkpoints import Position, newest_position, write_position
from nexus_core.train.evaluation import SCORE, Best, HeldOut
from nexus_core.train.gradients import Batches, Gradients
from nexus_core.train.health import Health
from nexus_core.train.journal import Journal
from nexus_core.train.memory import peak_memory_gb
from nexus_core.train.optimizer import Optimizer, Part
from nexus_core.train.passes import OnlineTeacher, TeacherSource, output_head
from nexus_core.train.schedule import Schedule, StepSettings
from nexus_core.train.selection_bias import SelectionBiases
from nexus_core.train.setup import Objective, ready_parameters, recompute_activations

JOURNAL_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
BEST_NAME = "best"

# With `on_nonfinite: skip`: so many steps in a row that could not be taken are no accident.
MOST_SKIPPED = 10

Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """The end of a run: parameters by name as the model has them, the journal of all steps, how many steps there were,
    and after which of them the parameters are: the last, or the one that was best on held-out text.
    """

    parameters: dict[str, nn.Parameter]
    journal: Journal
    steps: int
    chosen_step: int


def fit(
    model: nn.Module,
    family: Family,
    batches: Batches,
    settings: Train,
    objective: Objective,
    learnt: Collection[str],
    folder: Path,
    report: Report = lambda step, values: None,
    *,
    teacher: TeacherSource | None = None,
    held_out: HeldOut | None = None,
) -> Trained:
    """Train the model's additions in place, going on from the newest checkpoint in `folder` if there is one.

    objective: losses and routing. learnt: names of the data sets to learn from; all others are kept. folder: gets
    metrics.jsonl and checkpoints/. report: called with every row of metrics.jsonl. teacher: by default the model
    itself with its additions off. held_out: measured every `settings.evaluate.every` steps. The same settings, data
    and model give the same bits, also after an interruption. Raises TrainingError if the loss or the gradient is not
    finite and `settings.on_nonfinite` is `stop`, or too often in a row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with listen(model, family) as listener:
        run = _Run(model, family, batches, settings, objective, learnt, folder, report, listener, teacher, held_out)
        try:
            return run.go()
        finally:
            run.optimizer.close()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        family: Family,
        batches: Batches,
        settings: Train,
        objective: Objective,
        learnt: Collection[str],
        folder: Path,
        report: Report,
        listener: Listener,
        teacher: TeacherSource | None,
        held_out: HeldOut | None,
    ):
        self.model, self.settings, self.report = model.eval(), settings, report
        self.device = next(model.parameters()).device
        self.schedule = Schedule.of(settings)
        trainables = ready_parameters(model, family, objective, settings.schedule.bias_lr_multiplier)
        self.parameters = trainables.parameters
        self.optimizer = Optimizer(trainables.groups, weight_decay=settings.weight_decay)
        rule, biases = trainables.plan.selection_step, list(trainables.selection_biases.values())
        self.selection_biases = SelectionBiases(biases, rule) if rule else None
        if self.selection_biases:
            self.selection_biases.refuse_if_ignored(model, listener)
        self.isolates = isolates_documents(model)
        self.head = output_head(model)
        self.gradients = Gradients(
            model,
            self.head,
            listener,
            teacher or OnlineTeacher(model, listener, self.head),
            objective,
            batches,
            frozenset(learnt),
            settings.gradient_accumulation,
            self.isolates,
            self.selection_biases,
        )
        if settings.gradient_checkpointing:
            recompute_activations(model)
        self.held_out, self.best = held_out, Best()
        averaging = settings.anchor
        self.anchor = Anchor(averaging.interval, averaging.alpha, self.optimizer.masters()) if averaging else None
        self.journal = Journal(folder / JOURNAL_NAME)
        self.checkpoints, self.best_folder = folder / CHECKPOINTS_NAME, folder / BEST_NAME
        self.health = Health(lambda warning: print(f"warning: train: {warning}", file=sys.stderr))
        self.last_good = "no checkpoint was written yet"
        self.skipped_in_a_row = 0

    def go(self) -> Trained:
        done = self._resume()
        last = self.settings.max_steps
        if done == 0:
            values = self._before_the_first_step()
            self._record(0, values | self._evaluate(0))
        with Progress("train", last, "steps") as progress:
            progress.resume_at(done)
            while done < last and not self._has_given_up():
                done += 1
                values = self._step(done)
                self._record(done, values | self._evaluate(done))
                self.health.watch(done, values)
                if done % self.settings.checkpoint_every == 0 or done == last or self._has_given_up():
                    self._write_checkpoint(done)
                progress.advance(1, f"loss {values['loss']:.3f}" if "loss" in values else "skipped")
        if done < last:
            print(
                f"train: stopped after step {done:,}: no better on held-out text than after step {self.best.step:,} in "
                f"{self.best.evaluations_since} evaluations",
                file=sys.stderr,
            )
        return Trained(self.parameters, self.journal, done, self._choose(done))

    def _resume(self) -> int:
        position = newest_position(self.checkpoints)
        self.journal.cut_after(position.step if position else -1)
        if position is None:
            return 0
        self._load(position)
        self.optimizer.load_state_tensors(position.optimizer)
        if self.anchor:
            self.anchor.load_state_tensors(position.optimizer)
        self.best = Best.of(position.record.get("best", {}))
        self.skipped_in_a_row = position.record.get("skipped_in_a_row", 0)
        self.last_good = f"the last good checkpoint is {position.folder}"
        print(f"train: going on after step {position.step:,} from {position.folder}", file=sys.stderr)
        return position.step

    @torch.no_grad()
    def _load(self, position: Position) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(position.trainables[name])

    def _write_checkpoint(self, step: int) -> None:
        state = self.optimizer.state_tensors() | (self.anchor.state_tensors() if self.anchor else {})
        record = {
            "max_steps": self.settings.max_steps,
            "next_batch": step * self.settings.gradient_accumulation,
            "best": self.best.as_record(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        keep = self.settings.keep_checkpoints
        folder = write_position(self.checkpoints, step, self.parameters, state, record, keep=keep)
        self.last_good = f"the last good checkpoint is {folder}"

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        self.journal.write(step, values)
        self.report(step, values)

    def _before_the_first_step(self) -> dict[str, float]:
        """Losses of the untrained model on the first step's data: where the run starts from."""
        with torch.no_grad():
            values = self.gradients.add(self.gradients.micro_batches(1), self.schedule.at(1))
        if self.selection_biases:
            self.selection_biases.move(learns=False)
        return values

    def _step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        step_settings = self.schedule.at(step)
        micro_batches = self.gradients.micro_batches(step)
        values = self.gradients.add(micro_batches, step_settings)
        fixed = _fixed_parts(step_settings)
        try:
            if not math.isfinite(values["loss"]):
                raise TrainingError(f"the loss is {values['loss']}")
            norm = self.optimizer.step(
                step_settings.learning_rate, max_gradient_norm=self.settings.max_gradient_norm, fixed=fixed
            )
        except TrainingError as error:
            values = self._skip(step, str(error))
        else:
            self.skipped_in_a_row = 0
            values |= self._rates(step_settings, fixed) | {"gradient_norm": norm}
            if self.anchor and self.anchor.after_step(step, self.optimizer.masters()):
                self.optimizer.masters_changed()
        if self.selection_biases:
            learns = step_settings.router_biases_learn and not self.skipped_in_a_row
            self.selection_biases.move(learns=learns)
        seconds = time.perf_counter() - started
        tokens = sum(micro_batch.input_ids.numel() for micro_batch in micro_batches)
        return values | {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(self.device),
        }

    def _rates(self, step_settings: StepSettings, fixed: Collection[Part]) -> dict[str, float]:
        """What the step went by; the router's own learning rates only if it has any."""
        rates = self.optimizer.learning_rates(step_settings.learning_rate, fixed=fixed)
        own = {f"learning_rate/{part}": rate for part, rate in rates.items() if part != "shared_experts"}
        return {"learning_rate": step_settings.learning_rate, "temperature": step_settings.temperature, **own}

    def _skip(self, step: int, reason: str) -> dict[str, float]:
        """Leave the weights as they are and go on, if that is wanted and not the rule by now; else raise."""
        self.optimizer.forget_gradients()
        self.skipped_in_a_row += 1
        if self.settings.on_nonfinite == "stop":
            raise self._stopped(step, reason)
        if self.skipped_in_a_row > MOST_SKIPPED:
            raise self._stopped(step, f"{reason}, and so it was in the {MOST_SKIPPED} steps before")
        print(f"warning: train: step {step} is left out: {reason}", file=sys.stderr)
        return {"skipped": 1.0}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out losses if it is time for them; a state that is better than all before is kept in best/."""
        every = self.settings.evaluate.every
        if self.held_out is None or every is None or (step % every and step != self.settings.max_steps):
            return {}
        values = self.held_out.measure(self.model, self.head, isolates=self.isolates)
        if self.best.take(step, values[SCORE]):
            write_position(self.best_folder, step, self.parameters, {}, {"score": values[SCORE]}, keep=1)
        return values

    def _has_given_up(self) -> bool:
        patience = self.settings.evaluate.patience
        return patience is not None and self.best.evaluations_since >= patience

    def _choose(self, done: int) -> int:
        """Put the best state into the model, if states were compared and the best is wanted; returns its step."""
        if self.best.step in (-1, done) or self.settings.evaluate.keep == "last":
            return done
        position = newest_position(self.best_folder)
        if position is None:
            raise TrainingError(f"{self.best_folder}: the best state, after step {self.best.step}, cannot be read")
        self._load(position)
        return position.step

    def _stopped(self, step: int, reason: str) -> TrainingError:
        return TrainingError(
            f"train stopped at step {step}: {reason}; {self.last_good}. Lower train.learning_rate (now "
            f"{self.settings.learning_rate:g}) or train.max_gradient_norm, or raise train.schedule.warmup_ratio"
        )


def _fixed_parts(step_settings: StepSettings) -> list[Part]:
    fixed: list[Part] = []
    if not step_settings.router_weights_learn:
        fixed.append("router_weights")
    if not step_settings.router_biases_learn:
        fixed.append("router_biases")
    return fixed
