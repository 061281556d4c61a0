"""What a stage is: a name, a code version, what its key is made of, and a function that fills a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.recipe.schema import Recipe, Source

Metrics = dict[str, float | int | str]

# The stage that has the base write text, and the ending of the files it leaves, one for each name under `generate`.
GENERATE, COMPLETIONS = "generate", ".jsonl"


@dataclass(frozen=True)
class StageContext:
    """All that a running stage may use.

    inputs: finished folders of earlier stages by stage name. out: the folder to fill; it becomes visible under its
    final name only after the stage's function has returned. A stage that resumes finds there what an interrupted
    try left; any other finds it empty. device: where models run. report: metrics of one step, for observers.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    inputs: Mapping[str, Path]
    out: Path
    device: str
    report: Callable[[int, Mapping[str, float]], None]

    @property
    def data(self) -> dict[str, list[Source]]:
        """The recipe's data sets, with the files that `generate` wrote where a source names what the base writes."""
        return {name: [self._found(source) for source in sources] for name, sources in self.recipe.data.items()}

    def _found(self, source: Source) -> Source:
        if source.generated is None:
            return source
        return source.model_copy(update={"path": str(self.inputs[GENERATE] / f"{source.generated}{COMPLETIONS}")})


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    version: raised whenever the stage's code changes what it writes, so that older outputs are not reused. inputs:
    names of the stages it reads. settings: the part of the recipe that its output depends on, as plain data; together
    with version, inputs' keys and the model's fingerprint it makes the key. run: fills `context.out` and returns the
    stage's final numbers. sets: names of the data sets it reads. resumes: whether `run` can go on from a partial
    folder. splits: whether every process calls `run`, each with the same inputs and `out`, to do its part; else the
    first one alone does. runs_model: whether it runs a model, by implementations that its family may choose. wanted:
    whether a recipe has this stage at all; later stages get it as an input only then.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], Mapping[str, Any]]
    run: Callable[[StageContext], Metrics]
    sets: Callable[[Recipe], Collection[str]] = lambda recipe: recipe.data
    resumes: bool = False
    splits: bool = False
    runs_model: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True

    def for_recipe(self, recipe: Recipe) -> Stage:
        """This stage with only those inputs that it reads under a recipe: no text that its data sets do not name."""
        if GENERATE not in self.inputs or reads_generated(recipe, self.sets(recipe)):
            return self
        return replace(self, inputs=tuple(name for name in self.inputs if name != GENERATE))


def reads_generated(recipe: Recipe, names: Collection[str]) -> bool:
    """Whether one of these data sets has text that the base writes."""
    return any(source.generated for name in names for source in recipe.data.get(name, ()))
