"""Runs a recipe: reuses the stages whose outputs are there, runs the others, and tells observers.

Of several processes, the first does what is here; the others follow it, see nexus_core.pipeline.follow.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.models import choose_device
from nexus_core.pipeline.environment import execution, versions
from nexus_core.pipeline.failures import explained
from nexus_core.pipeline.follow import dismiss, follow, with_followers
from nexus_core.pipeline.inputs import check_inputs, check_splits
from nexus_core.pipeline.observers import Observers
from nexus_core.pipeline.order import from_there_on
from nexus_core.pipeline.outline import other_teacher
from nexus_core.pipeline.plan import Plan, Step, plan_recipe
from nexus_core.pipeline.preflight import look_ahead
from nexus_core.pipeline.store import plain
from nexus_core.plugins import installed
from nexus_core.processes import world
from nexus_core.progress import clock
from nexus_core.recipe.load import resolved
from nexus_core.recipe.schema import Recipe
from nexus_core.stages.stage import StageContext
from nexus_core.types import RunDescription, StageOutcome

OnOutcome = Callable[[StageOutcome], None]


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
    rerun: Collection[str] = (),
    verify: bool = False,
    anyway: bool = False,
    on_outcome: OnOutcome = lambda outcome: None,
) -> RunResult:
    """Run a recipe, up to the stage `until`, and return what came of it.

    rerun: stages to run again although their outputs are there; everything that reads them runs again too.
    verify: read every byte of the model for its fingerprint. on_outcome: called with each stage as it is there.
    Nothing is written before model, data and recipe have been found to fit, and every stage that has to run its memory,
    by its estimate; anyway: start what does not fit its memory too. To be called by every process that takes
    part, with the same arguments. Raises NexusError with the way out; finished stages stay, and a stage that resumes
    keeps what it had.
    """
    if not world().is_first:
        return RunResult(recipe, follow(recipe, on_outcome=on_outcome))
    checkpoint = open_checkpoint(recipe.model.path, recipe.model.revision)
    check_inputs(recipe, checkpoint)
    plan = plan_recipe(recipe, until=until, verify=verify, checkpoint=checkpoint)
    again = from_there_on([step.stage for step in plan.steps], rerun)
    to_run = [step.stage.name for step in plan.steps if step.found is None or step.stage.name in again]
    check_splits(recipe, to_run)
    if not anyway:
        look_ahead(recipe, checkpoint, teacher=other_teacher(recipe), timed=False).refuse_misfits(to_run)
    return execute(plan, rerun=rerun, on_outcome=on_outcome)


def execute(plan: Plan, *, rerun: Collection[str] = (), on_outcome: OnOutcome = lambda outcome: None) -> RunResult:
    """Carry out a plan, on the first process. Raises as `run_recipe`."""
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
        dismiss(outcomes)
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
        # Families tell of the whole process: of a stage without a model only what it was the first to use is its own.
        others = {} if stage.runs_model else dict(plan.checkpoint.family.hook.nexus_backends())
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        started = time.monotonic()
        try:
            metrics = plain(with_followers(stage, context))
        except BaseException:
            if not stage.resumes:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        backends = {
            part: name for part, name in plan.checkpoint.family.hook.nexus_backends().items() if part not in others
        }
        if backends:
            _say(stage.name, "computed by " + ", ".join(f"{name} ({part})" for part, name in backends.items()))
        record = store.finish(
            step.ingredients,
            seconds=time.monotonic() - started,
            metrics=metrics,
            created=created,
            versions=versions(),
            backends=backends,
        )
    return StageOutcome(stage.name, step.key, step.path, False, record.seconds, record.metrics)


@contextmanager
def _failures_told(step: Step, run: RunDescription, observers: Observers) -> Iterator[None]:
    """Tell observers of a stage that fails, and turn an interruption or lack of memory into a sentence."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        observers.tell("nexus_stage_failed", run=run, stage=step.stage.name, error=error)
        clear = explained(error, step.stage, run.execution["device"])
        if clear is error:
            raise
        raise clear from error


def _say(stage: str, text: str) -> None:
    print(f"{stage:<9} {text}", file=sys.stderr, flush=True)
