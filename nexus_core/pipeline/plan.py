"""What running a recipe would do: its stages, what each depends on, and which outputs are there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_core.checkpoint.fingerprint import fingerprint
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.pipeline.keys import Ingredients, ingredients
from nexus_core.pipeline.order import all_stages, up_to
from nexus_core.pipeline.store import StageRecord, Store
from nexus_core.recipe.schema import Recipe
from nexus_core.stages.stage import Stage


@dataclass(frozen=True)
class Step:
    """One stage of a plan. found: the record of its output, None if it has to run. path: its place, there or not."""

    stage: Stage
    ingredients: Ingredients
    path: Path
    found: StageRecord | None

    @property
    def key(self) -> str:
        return self.ingredients.key


@dataclass(frozen=True)
class Plan:
    """A recipe, its opened checkpoint, its store, and the steps in order. Making one writes nothing."""

    recipe: Recipe
    checkpoint: Checkpoint
    store: Store
    steps: tuple[Step, ...]

    @property
    def fingerprint(self) -> str:
        """The checkpoint's."""
        return self.steps[0].ingredients.model["fingerprint"]


def plan_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    verify: bool = False,
    checkpoint: Checkpoint | None = None,
    stages: Sequence[Stage] | None = None,
) -> Plan:
    """The plan for a recipe, up to the stage `until`. Opens the model and reads the data files for their keys.

    verify: read every byte of the model and the data. checkpoint, stages: instead of the recipe's and the pipeline's.
    Raises CheckpointError, DataError or UsageError for what is missing, damaged or unknown.
    """
    known = all_stages() if stages is None else stages
    wanted = up_to([stage.for_recipe(recipe) for stage in known if stage.wanted(recipe)], until)
    checkpoint = checkpoint or open_checkpoint(recipe.model.path, recipe.model.revision)
    model = {"fingerprint": fingerprint(checkpoint.folder, verify=verify), "dtype": recipe.model.dtype}
    store = Store(Path(recipe.run.store).expanduser())
    steps: dict[str, Step] = {}
    for stage in wanted:
        inputs = {name: steps[name].key for name in stage.inputs if name in steps}
        made_of = ingredients(stage, recipe, inputs, model, verify=verify)
        key = made_of.key
        steps[stage.name] = Step(stage, made_of, store.place(stage.name, key), store.find(stage.name, key))
    return Plan(recipe, checkpoint, store, tuple(steps.values()))
