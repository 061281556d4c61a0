"""Whether model, data and recipe fit each other: seen before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.documents import Part, check_parts
from nexus_core.data.prompts import check_prompts
from nexus_core.data.records import check_source
from nexus_core.errors import DataError, Problem, RecipeError
from nexus_core.recipe.checks import check_against_model
from nexus_core.recipe.schema import Recipe, Records, Source


def check_inputs(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """See that the recipe fits the model and that all of its data is there. Raises RecipeError with all that is not."""
    problems = check_against_model(recipe, checkpoint.description)
    sets: list[tuple[str, Callable[[Any, str], str], Sequence[Records]]] = [
        (f"data.{name}", check_source, sources) for name, sources in recipe.data.items()
    ]
    sets += [(f"generate.{name}.prompts", check_prompts, item.prompts) for name, item in recipe.generate.items()]
    for key, check, sources in sets:
        for position, source in enumerate(sources):
            if isinstance(source, Source) and source.generated:
                continue  # its prompts are looked at
            where = recipe.location(f"{key}.{position}.path")
            try:
                check(source, where)
            except DataError as error:
                problems.append(Problem(where, f"{key}.{position}", str(error).removeprefix(f"{where}: ")))
    if problems:
        raise RecipeError(problems)


def check_splits(recipe: Recipe, stages: Collection[str]) -> None:
    """See that every data set has records on each side of its split that one of these stages reads: a set too small
    for `held_out` would else fail `validate` when all before it is done. Raises RecipeError with all that have none.
    """
    sides: dict[str, list[Part]] = {name: [] for name in recipe.data}
    for name in recipe.trained_sets if "train" in stages else ():
        sides[name].append("train")
    measures = recipe.train.evaluate.every is not None
    measured = recipe.data if "validate" in stages else recipe.trained_sets if "train" in stages and measures else ()
    for name in measured:
        sides[name].append("held_out")
    problems = []
    for name, parts in sides.items():
        for position, source in enumerate(recipe.data[name] if parts else ()):
            if source.generated:
                continue  # not written yet
            try:
                check_parts(source, parts)
            except DataError as error:
                key = f"data.{name}.{position}"
                problems.append(Problem(recipe.location(f"{key}.path"), key, str(error)))
    if problems:
        raise RecipeError(problems)
