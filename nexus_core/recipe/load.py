"""Recipes from files, flags or Python: read, overridden, checked as a whole, and made explicit.

Nothing here opens a model or data or touches the network: that a recipe can be read says what it means, not that it
can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from nexus_core.errors import Problem, RecipeError
from nexus_core.recipe.checks import check_execution, check_names
from nexus_core.recipe.explain import in_order, validated
from nexus_core.recipe.located import KeyPath, Located, Place, dotted, read_yaml
from nexus_core.recipe.override import override
from nexus_core.recipe.schema import Recipe
from nexus_core.recipe.sections import Section
from nexus_core.recipe.strategies import CHOICES, LOSSES, complete, complete_losses, default_losses

SectionModel = TypeVar("SectionModel", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, every strategy parameter, data share and learnt set written out.

    overrides: `KEY=VALUE` assignments as given to `--set`, applied before anything is checked.
    Raises RecipeError with everything that is wrong, each with its place, key and remedy.
    """
    text = _read(Path(path))
    located = read_yaml(text, str(path))
    if located.value is None and not located.problems:
        raise RecipeError([Problem(str(path), "", "is empty; a recipe begins with 'schema: 1', see docs/recipes.md")])
    recipe = _checked(located, overrides)
    recipe._name, recipe._folder, recipe._text = Path(path).stem, Path(path).resolve().parent, text
    return recipe


def recipe_from(settings: Mapping[str, Any], *, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain Python data of the same shape as the file, checked in the same way.

    name: of the recipe; also stands in for the file in errors. Raises RecipeError.
    """
    value = deepcopy(dict(settings))
    text = yaml.safe_dump(value, sort_keys=False)
    recipe = _checked(Located(name, value, {(): Place(name, name)}), overrides)
    recipe._name, recipe._folder, recipe._text = name, Path.cwd(), text
    return recipe


def section_from(
    section: type[SectionModel],
    values: Mapping[str, Any],
    assignments: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> SectionModel:
    """One section of a recipe as a command's flags give it: `section_from(Select, {"top_k": 24}, ("scale=2",))`.

    section: the model of a top-level section, or of those that one holds by name. values: by key; None is a flag that
    was not given. assignments: what `--set` got, with keys inside the section. flags: by key, where a flag is called
    something else. Checked and completed like a recipe's; raises RecipeError naming flags.
    """
    fields = {field.alias or name: field for name, field in Recipe.model_fields.items()}
    name = next(key for key, field in fields.items() if section in (field.annotation, *get_args(field.annotation)))
    given = {key: deepcopy(value) for key, value in values.items() if value is not None}
    command = Place(f"nexus {name}", f"nexus {name}")
    flags = {key: f"--{key.replace('_', '-')}" for key in given} | dict(flags or {})
    places: dict[KeyPath, Place] = {(): command, (name,): command}
    places |= {(name, key): Place(flag, flag) for key, flag in flags.items()}
    located = Located(f"nexus {name}", {name: given}, places)
    default_losses(located, assignments, root=(name,))
    problems = override(located, assignments, root=(name,))
    problems += complete(located, tuple(choice for choice in CHOICES if choice.path[0] == name))
    if name == LOSSES[0]:
        problems += complete_losses(located)
    problems += check_names(located)
    settings, found = validated(section, located, (name,))
    if settings is None or problems:
        raise RecipeError(in_order(problems + found))
    return settings


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every key and default written out: what keys are made of and MLflow records."""
    return recipe.model_dump(mode="json", by_alias=True)


def _checked(located: Located, overrides: Sequence[str]) -> Recipe:
    default_losses(located, overrides)
    problems = override(located, overrides)
    problems = located.problems + problems
    if isinstance(located.value, dict):
        problems += complete(located) + complete_losses(located) + check_names(located) + check_execution(located)
    if not problems:
        _make_explicit(located.value)
    recipe, found = validated(Recipe, located)
    # What could not be read is missing here too: once is enough.
    told = {(problem.location, problem.key) for problem in located.problems}
    found = [problem for problem in found if (problem.location, problem.key) not in told]
    if recipe is None or problems:
        raise RecipeError(in_order(problems + found))
    recipe._locations = {dotted(path): place.value for path, place in located.places.items()}
    return recipe


def _make_explicit(settings: Any) -> None:
    """Write out what is left to the order or number of the data sets, where the shape of the recipe allows it."""
    sets = settings.get("data") if isinstance(settings, dict) else None
    if not isinstance(sets, dict):
        return
    for name in ("collect", "train"):
        if settings.get(name) is None and name not in settings:
            settings[name] = {}
        section = settings[name]
        if isinstance(section, dict) and section.get("data") is None:
            section["data"] = dict.fromkeys(sets, 1.0)
    train = settings["train"]
    if isinstance(train, dict) and train.get("learn") is None and isinstance(train["data"], dict):
        train["learn"] = list(train["data"])[:1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        near = {file.name: file for folder in (Path("recipes"), path.parent) for file in _recipes_in(folder)}
        close = get_close_matches(path.name, near, n=1, cutoff=0.6)
        hint = f"did you mean '{near[close[0]]}'?" if close else "give the path of a recipe file"
        raise RecipeError([Problem(str(path), "", f"there is no such file; {hint}")]) from error
    except IsADirectoryError as error:
        names = [str(file) for file in _recipes_in(path)]
        holds = f" it holds, e.g. {names[0]}" if names else ""
        raise RecipeError([Problem(str(path), "", f"is a folder; name a recipe file{holds}")]) from error
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start}); a recipe is a YAML file, save it as UTF-8"
        raise RecipeError([Problem(str(path), "", message)]) from error
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error


def _recipes_in(folder: Path) -> list[Path]:
    return sorted(file for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern)) if folder.is_dir() else []
