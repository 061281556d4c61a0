"""What a stage is: a name, a code version, what its key is made of, and a function that fills a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.recipe.schema import Recipe

Metrics = dict[str, float | int | str]


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


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    version: raised whenever the stage's code changes what it writes, so that older outputs are not reused. inputs:
    names of the stages it reads. settings: the part of the recipe that its output depends on, as plain data; together
    with version, inputs' keys and the model's fingerprint it makes the key. run: fills `context.out` and returns the
    stage's final numbers. resumes: whether `run` can go on from a partial folder. wanted: whether a recipe has this
    stage at all; later stages get it as an input only then.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], Mapping[str, Any]]
    run: Callable[[StageContext], Metrics]
    resumes: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True
