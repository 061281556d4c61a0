"""Runs a recipe: reuses the stages whose outputs are there, runs the others, and tells observers."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import StageError, is_out_of_memory
from nexus_core.models import choose_device
from nexus_core.pipeline.environment import execution, versions
from nexus_core.pipeline.observers import Observers
from nexus_core.pipeline.order import from_there_on
from nexus_core.pipeline.plan import Plan, Step, plan_recipe
from nexus_core.pipeline.preflight import check_inputs
from nexus_core.pipeline.store import plain
from nexus_core.plugins import installed
from nexus_core.progress import clock
from nexus_core.recipe.load import resolved
from nexus_core.recipe.schema import Recipe
from nexus_core.stages.stage import StageContext
from nexus_core.types import RunDescription, StageOutcome

OnOutcome = Callable[[StageOutcome], None]


class Interrupted(StageError):
    """The person at the keyboard, or the machine, asked the run to stop."""

    exit_code = 130


@dataclass(frozen=True)
class RunResult:
    """A finished run: its stages in order, each with where its output lies and its final numbers."""

    recipe: Recipe
    outcomes: tuple[StageOutcome, ...]

    def outcome(self, stage: str) -> StageOutcome | None:
        """One stage's outcome; None if the run ended before it."""
        return next((outcome for outcome in self.outcomes if outcome.name == stage), None)


def run_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    rerun: Iterable[str] = (),
    verify: bool = False,
    on_outcome: OnOutcome = lambda outcome: None,
) -> RunResult:
    """Run a recipe, up to the stage `until`, and return what came of it.

    rerun: stages to run again although their outputs are there; everything that reads them runs again too.
    verify: read every byte of the model for its fingerprint. on_outcome: called with each stage as it is there.
    Nothing is written before model, data and recipe have been found to fit. Raises NexusError with the way out;
    finished stages stay, and a stage that resumes keeps what it had.
    """
    checkpoint = open_checkpoint(recipe.model.path, recipe.model.revision)
    check_inputs(recipe, checkpoint)
    plan = plan_recipe(recipe, until=until, verify=verify, checkpoint=checkpoint)
    return execute(plan, rerun=rerun, on_outcome=on_outcome)


def execute(plan: Plan, *, rerun: Iterable[str] = (), on_outcome: OnOutcome = lambda outcome: None) -> RunResult:
    """Carry out a plan. Raises as `run_recipe`."""
    again = from_there_on([step.stage for step in plan.steps], rerun)
    device = choose_device(plan.recipe.run.device)
    observers = Observers(installed())
    run = RunDescription(
        recipe=plan.recipe.name,
        settings=resolved(plan.recipe),
        source=plan.recipe.text,
        store=plan.store.root,
        execution=execution(plan.recipe, device),
    )
    outcomes: list[StageOutcome] = []
    status = "failed"
    observers.tell("nexus_run_started", run=run)
    try:
        for step in plan.steps:
            inputs = {outcome.name: outcome.path for outcome in outcomes if outcome.name in step.stage.inputs}
            with _failures_told(step, run, observers):
                outcome = _reuse(step, plan) if step.stage.name not in again else None
                if outcome is None:
                    outcome = _run(step, plan, run, inputs, device, observers, replaces=step.stage.name in again)
                plan.store.point_latest(plan.recipe.name, outcome.name, outcome.key)
            outcomes.append(outcome)
            _say(
                outcome.name,
                f"{'reused' if outcome.reused else 'done in ' + clock(outcome.seconds):<13} {outcome.path}",
            )
            on_outcome(outcome)
            observers.tell("nexus_stage_finished", run=run, outcome=outcome)
        status = "done"
    finally:
        observers.tell("nexus_run_finished", run=run, status=status, outcomes=list(outcomes))
    return RunResult(plan.recipe, tuple(outcomes))


def _reuse(step: Step, plan: Plan) -> StageOutcome | None:
    """The outcome of a stage whose output is there by now, else None."""
    record = plan.store.find(step.stage.name, step.key)
    if record is None:
        return None
    return StageOutcome(
        name=record.name,
        key=record.key,
        path=step.path,
        reused=True,
        seconds=record.seconds,
        metrics=record.metrics,
    )


def _run(
    step: Step,
    plan: Plan,
    run: RunDescription,
    inputs: Mapping[str, Path],
    device: str,
    observers: Observers,
    *,
    replaces: bool,
) -> StageOutcome:
    stage, store = step.stage, plan.store
    waited = False

    def wait(owner: str) -> None:
        nonlocal waited
        waited = True
        _say(stage.name, f"waits for {owner}, which is making {step.path}")

    with store.writing(stage.name, step.key, wait):
        # Another run may have made it since the plan was; one that we waited for also did what --rerun asks.
        outcome = _reuse(step, plan) if waited or not replaces else None
        if outcome is not None:
            return outcome
        partial = store.partial(stage.name, step.key, resumes=stage.resumes and not replaces)
        _say(stage.name, "runs")
        observers.tell(
            "nexus_stage_started", run=run, stage=stage.name, key=step.key, settings=step.ingredients.settings
        )
        context = StageContext(
            recipe=plan.recipe,
            checkpoint=plan.checkpoint,
            inputs=inputs,
            out=partial,
            device=device,
            report=lambda step_number, values: observers.tell(
                "nexus_metrics", stage=stage.name, step=step_number, values=values
            ),
        )
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        started = time.monotonic()
        try:
            metrics = plain(stage.run(context))
        except BaseException:
            if not stage.resumes:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        record = store.finish(
            step.ingredients,
            seconds=time.monotonic() - started,
            metrics=metrics,
            created=created,
            versions=versions(),
        )
    return StageOutcome(stage.name, step.key, step.path, False, record.seconds, record.metrics)


@contextmanager
def _failures_told(step: Step, run: RunDescription, observers: Observers) -> Iterator[None]:
    """Tell observers of a stage that fails, and turn an interruption or lack of memory into a sentence."""
    name = step.stage.name
    try:
        yield
    except KeyboardInterrupt as error:
        observers.tell("nexus_stage_failed", run=run, stage=name, error=error)
        goes_on = f"{name} goes on where it stopped" if step.stage.resumes else f"{name} starts again"
        raise Interrupted(
            f"interrupted in {name}; finished stages are kept, type the same command again and {goes_on}"
        ) from error
    except Exception as error:
        observers.tell("nexus_stage_failed", run=run, stage=name, error=error)
        if is_out_of_memory(error):
            raise StageError(
                f"{name}: out of memory on {run.execution['device']}; lower its batch_size or sequence_length, "
                "or set train.gradient_checkpointing: true"
            ) from error
        raise


def _say(stage: str, text: str) -> None:
    print(f"{stage:<9} {text}", file=sys.stderr, flush=True)
