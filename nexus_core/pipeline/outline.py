"""What running a recipe would do, as far as that can be told while weights that it reads are not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.pipeline.order import all_stages
from nexus_core.pipeline.plan import Step, plan_recipe
from nexus_core.recipe.schema import Recipe
from nexus_core.stages.stage import Stage

# The first stage that reads the model of `train.teacher.path`.
FIRST_WITH_TEACHER = "capture"


@dataclass(frozen=True)
class StageAhead:
    """A stage of the recipe. step: where its output lies or will lie; None while weights that its key is made of are
    not here.
    """

    name: str
    step: Step | None

    @property
    def is_reused(self) -> bool:
        return self.step is not None and self.step.found is not None


@dataclass(frozen=True)
class Outline:
    """A recipe, its model, its store, and the stages in order. fingerprint: the model's; None without its weights."""

    recipe: Recipe
    checkpoint: Checkpoint
    store: Path
    stages: tuple[StageAhead, ...]
    fingerprint: str | None


def outline_recipe(recipe: Recipe, checkpoint: Checkpoint, teacher: Checkpoint | None = None) -> Outline:
    """The plan of a recipe with reuse keys for the stages before the first that reads weights which are not here.

    teacher: the other model that `capture` runs, if there is one. Raises as `plan_recipe`.
    """
    steps: tuple[Step, ...] = ()
    later: Sequence[Stage] = ()
    fingerprint = None
    if checkpoint.lacks_weights:
        later = [stage for stage in all_stages() if stage.wanted(recipe)]
    else:
        earlier = None
        if teacher is not None and teacher.lacks_weights:
            stages = [stage for stage in all_stages() if stage.wanted(recipe)]
            first = [stage.name for stage in stages].index(FIRST_WITH_TEACHER)
            earlier, later = stages[:first], stages[first:]
        plan = plan_recipe(recipe, checkpoint=checkpoint, stages=earlier)
        steps, fingerprint = plan.steps, plan.fingerprint
    ahead = [StageAhead(step.stage.name, step) for step in steps] + [StageAhead(stage.name, None) for stage in later]
    return Outline(recipe, checkpoint, Path(recipe.run.store).expanduser(), tuple(ahead), fingerprint)


def other_teacher(recipe: Recipe) -> Checkpoint | None:
    """The model of `train.teacher.path`, opened without downloading its weights; None if the base teaches."""
    teacher = recipe.train.teacher
    return None if teacher.path is None else open_checkpoint(teacher.path, teacher.revision, weights=False)
