"""The training loop: one copy of the model, every step a function of the seed and the step's number.

Losses, schedule, routing, engines, evaluation and checkpoints live in files of their own; this one puts them together.
Of several processes all do the same, each with its share of every step; the first one writes and speaks.
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
from nexus_core.processes import join
from nexus_core.progress import Progress
from nexus_core.recipe.schema import DeepSpeed
from nexus_core.recipe.training import Train
from nexus_core.statistics.listening import listen
from nexus_core.train.anchor import Anchor
from nexus_core.train.engines import Engine, new_engine
from nexus_core.train.evaluation import SCORE, Best, HeldOut
from nexus_core.train.gradients import Batches, Gradients
from nexus_core.train.health import Health
from nexus_core.train.journal import Journal
from nexus_core.train.keeper import Keeper
from nexus_core.train.memory import peak_memory_gb
from nexus_core.train.optimizer import Part
from nexus_core.train.passes import OnlineTeacher, TeacherSource, find_output_head, refuse_other_head
from nexus_core.train.schedule import Schedule, StepSettings
from nexus_core.train.selection_bias import SelectionBiases
from nexus_core.train.setup import (
    Objective,
    Trainables,
    can_recompute,
    ready_parameters,
    recompute_activations,
)

JOURNAL_NAME = "metrics.jsonl"

# With `on_nonfinite: skip`: so many steps in a row that could not be taken are no accident.
MOST_SKIPPED = 10

Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """The end of a run: the journal of all steps, how many there were, after which of them the numbers are (the last,
    or the one that was best on held-out text), and how many numbers learn.

    additions: all that was added to the model, by name, whole; on the first process only.
    """

    additions: dict[str, torch.Tensor]
    journal: Journal
    steps: int
    chosen_step: int
    learning_numbers: int


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
    deepspeed: DeepSpeed | None = None,
    device: str | torch.device | None = None,
) -> Trained:
    """Train the model's additions in place, going on from the newest checkpoint in `folder` if there is one.

    objective: losses and routing. learnt: names of the data sets to learn from; all others are kept. folder: gets
    metrics.jsonl and checkpoints/. report: called with every row of metrics.jsonl. teacher: by default the model
    itself with its additions off. held_out: measured every `settings.evaluate.every` steps. deepspeed: how several
    processes share what there is; None is not at all. device: to compute on, by default where the model is. The same
    settings, data, model and number of processes give the same bits, also after an interruption; another number of
    processes, or none of them DeepSpeed's, the same but for rounding. After DeepSpeed the model is of no more use.
    Raises TrainingError if the loss or the gradient is not finite and `settings.on_nonfinite` is `stop`, or too often
    in a row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    trainables = ready_parameters(model.eval(), family, objective, settings.schedule.bias_lr_multiplier)
    learning_numbers = sum(parameter.numel() for parameter in trainables.parameters.values())
    # Every process keeps a whole head: losses read it outside of forward passes, for which DeepSpeed would gather it
    # anew in every micro-batch, and while it is gathered it takes as much memory (docs/decisions/0013).
    head = find_output_head(model).on(place)
    rule, by_rule = trainables.plan.selection_step, list(trainables.selection_biases.values())
    selection_biases = SelectionBiases(by_rule, rule, place) if rule else None
    here = join()
    engine = new_engine(model, family, trainables, settings, deepspeed, here, place)
    try:
        refuse_other_head(engine.model, head)
        with listen(model, family) as listener:
            if selection_biases:
                selection_biases.refuse_if_ignored(engine, listener)
            gradients = Gradients(
                engine,
                head,
                listener,
                teacher or OnlineTeacher(engine.model, listener, head),
                objective,
                batches,
                frozenset(learnt),
                settings.gradient_accumulation,
                isolates_documents(engine.model),
                selection_biases,
                here,
            )
            if settings.recomputes_on(place.type, is_possible=can_recompute(model)):
                recompute_activations(model)
            run = _Run(engine, trainables, gradients, settings, folder, report, held_out)
            steps, chosen = run.go()
        additions = engine.whole(family.hook.nexus_trainable_parameters(model=model))
        return Trained(additions, run.journal, steps, chosen, learning_numbers)
    finally:
        engine.close()


class _Run:
    def __init__(
        self,
        engine: Engine,
        trainables: Trainables,
        gradients: Gradients,
        settings: Train,
        folder: Path,
        report: Report,
        held_out: HeldOut | None,
    ):
        self.engine, self.gradients, self.settings = engine, gradients, settings
        self.here, self.selection_biases = gradients.here, gradients.selection_biases
        self.schedule = Schedule.of(settings)
        self.held_out, self.best = held_out, Best()
        averaging = settings.anchor
        self.anchor = Anchor(averaging.interval, averaging.alpha, engine.masters()) if averaging else None
        self.journal, self.report = Journal(folder / JOURNAL_NAME), report
        self.keeper = Keeper(folder, engine, trainables.parameters, self.anchor, keep=settings.keep_checkpoints)
        self.health = Health(lambda warning: self._say(f"warning: train: {warning}"))
        self.skipped_in_a_row = 0

    def go(self) -> tuple[int, int]:
        """Train to the end; returns how many steps there are, and after which of them the numbers are."""
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
            self._say(
                f"train: stopped after step {done:,}: no better on held-out text than after step {self.best.step:,} in "
                f"{self.best.evaluations_since} evaluations"
            )
        return done, self._choose(done)

    def _say(self, text: str) -> None:
        if self.here.is_first:
            print(text, file=sys.stderr)

    def _resume(self) -> int:
        position = self.keeper.take_up()
        if self.here.is_first:
            self.journal.cut_after(position.step if position else -1)
        if position is None:
            return 0
        self.best = Best.of(position.record.get("best", {}))
        self.skipped_in_a_row = position.record.get("skipped_in_a_row", 0)
        self._say(f"train: going on after step {position.step:,} from {position.folder}")
        return position.step

    def _write_checkpoint(self, step: int) -> None:
        record = {
            "max_steps": self.settings.max_steps,
            "next_batch": step * self.settings.gradient_accumulation,
            "best": self.best.as_record(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        self.keeper.write(step, record)

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        if self.here.is_first:
            self.journal.write(step, values)
            self.report(step, values)

    def _before_the_first_step(self) -> dict[str, float]:
        """Losses of the untrained model on the first step's data, and its perplexity: where the run starts from."""
        with torch.no_grad():
            values = self.gradients.add(self.gradients.data(1), self.schedule.at(1))
        if self.selection_biases:
            self.selection_biases.move(self.engine, learns=False)
        return values | ({"perplexity": math.exp(values["lm"])} if "lm" in values else {})

    def _step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        step_settings = self.schedule.at(step)
        self.engine.begin(step_settings.learning_rate, _fixed_parts(step_settings))
        data = self.gradients.data(step)
        values = self.gradients.add(data, step_settings)
        try:
            if not math.isfinite(values["loss"]):
                self.engine.forget_gradients()
                raise TrainingError(f"the loss is {values['loss']}")
            norm = self.engine.step(max_gradient_norm=self.settings.max_gradient_norm)
        except TrainingError as error:
            values = self._skip(step, str(error))
        else:
            self.skipped_in_a_row = 0
            values |= self._rates(step_settings) | {"gradient_norm": norm}
            if self.anchor and self.anchor.is_due(step):
                self.engine.change(self.anchor.average)
        if self.selection_biases:
            learns = step_settings.router_biases_learn and not self.skipped_in_a_row
            self.selection_biases.move(self.engine, learns=learns)
        seconds = time.perf_counter() - started
        return values | {
            "tokens_per_second": data.places / seconds,
            "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(self.gradients.head.weight.device),
        }

    def _rates(self, step_settings: StepSettings) -> dict[str, float]:
        """What the step went by; the router's own learning rates only if it has any."""
        rates = self.engine.learning_rates()
        own = {f"learning_rate/{part}": rate for part, rate in rates.items() if part != "shared_experts"}
        return {"learning_rate": step_settings.learning_rate, "temperature": step_settings.temperature, **own}

    def _skip(self, step: int, reason: str) -> dict[str, float]:
        """Go on without the step, if that is wanted and not the rule by now; else raise."""
        self.skipped_in_a_row += 1
        if self.settings.on_nonfinite == "stop":
            raise self._stopped(step, reason)
        if self.skipped_in_a_row > MOST_SKIPPED:
            raise self._stopped(step, f"{reason}, and so it was in the {MOST_SKIPPED} steps before")
        self._say(f"warning: train: step {step} is left out: {reason}")
        return {"skipped": 1.0}

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out losses if it is time for them; a state that is better than all before is kept in best/."""
        every = self.settings.evaluate.every
        if self.held_out is None or every is None or (step % every and step != self.settings.max_steps):
            return {}
        values = self.held_out.measure(self.engine.model, self.gradients.head, isolates=self.gradients.isolates)
        if self.best.take(step, values[SCORE]):
            self.keeper.write_best(step, values[SCORE])
        return values

    def _has_given_up(self) -> bool:
        patience = self.settings.evaluate.patience
        return patience is not None and self.best.evaluations_since >= patience

    def _choose(self, done: int) -> int:
        """Put the best state into the model, if states were compared and the best is wanted; returns its step."""
        if self.best.step in (-1, done) or self.settings.evaluate.keep == "last":
            return done
        return self.keeper.take_best()

    def _stopped(self, step: int, reason: str) -> TrainingError:
        return TrainingError(
            f"train stopped at step {step}: {reason}; {self.keeper.last_good}. Lower train.learning_rate (now "
            f"{self.settings.learning_rate:g}) or train.max_gradient_norm, or raise train.schedule.warmup_ratio"
        )


def _fixed_parts(step_settings: StepSettings) -> list[Part]:
    fixed: list[Part] = []
    if not step_settings.router_weights_learn:
        fixed.append("router_weights")
    if not step_settings.router_biases_learn:
        fixed.append("router_biases")
    return fixed
