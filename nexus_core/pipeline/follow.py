"""How the other processes of a run take part: the first one tells them which stage to help with, and where.

The first process owns the store, its locks, the observers and all that is printed; it decides what is reused. The
others know nothing of keys: they wait, do their part of a stage that splits, and wait again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import StageError
from nexus_core.models import choose_device
from nexus_core.pipeline.failures import explained
from nexus_core.pipeline.order import all_stages
from nexus_core.processes import barrier, broadcast, world
from nexus_core.recipe.schema import Recipe
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.types import StageOutcome


def with_followers(stage: Stage, context: StageContext) -> Metrics:
    """Run a stage on the first process: together with all others if it splits. Returns its final numbers."""
    if not stage.splits:
        return stage.run(context)
    inputs = {name: str(path) for name, path in context.inputs.items()}
    broadcast({"stage": stage.name, "out": str(context.out), "inputs": inputs})
    metrics = stage.run(context)
    barrier()
    return metrics


def dismiss(outcomes: Sequence[StageOutcome]) -> None:
    """Tell the others that the run is over, and what came of it."""
    broadcast({"outcomes": [asdict(outcome) | {"path": str(outcome.path)} for outcome in outcomes]})


def follow(recipe: Recipe, *, on_outcome: Callable[[StageOutcome], None]) -> tuple[StageOutcome, ...]:
    """Do this process's part of a run, and return what came of all of it; to be called on all but the first process.

    Raises what the stages raise, and OtherProcessFailed.
    """
    by_name = {stage.name: stage for stage in all_stages()}
    device = choose_device(recipe.run.device)
    checkpoint = None
    while True:
        order: Mapping[str, Any] = broadcast({})
        if "outcomes" in order:
            outcomes = tuple(StageOutcome(**told | {"path": Path(told["path"])}) for told in order["outcomes"])
            for outcome in outcomes:
                on_outcome(outcome)
            return outcomes
        # Opened only now: by the first order, the first process has fetched what is not on this machine yet.
        checkpoint = checkpoint or open_checkpoint(recipe.model.path, recipe.model.revision)
        stage, out = by_name[order["stage"]], Path(order["out"])
        if not out.is_dir():
            raise StageError(
                f"process {world().rank} does not see {out}, which the first process made; put run.store on a file "
                "system that all machines share"
            )
        inputs = {name: Path(path) for name, path in order["inputs"].items()}
        try:
            stage.run(StageContext(recipe, checkpoint, inputs, out, device, lambda step, values: None))
        except (Exception, KeyboardInterrupt) as error:
            clear = explained(error, stage, device)
            if clear is error:
                raise
            raise clear from error
        barrier()
