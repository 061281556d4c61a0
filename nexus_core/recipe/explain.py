"""What is wrong with a recipe's values, one sentence a problem: pydantic finds it, this says it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nexus_core.errors import Problem, suggestion
from nexus_core.recipe.located import KeyPath, Located, dotted
from nexus_core.recipe.schema import Recipe
from nexus_core.recipe.words import expected, field_at, given, is_by_name, keys_of, remedy, section_in

Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model], located: Located, path: KeyPath = (), values: Mapping[str, Any] | None = None
) -> tuple[Model | None, list[Problem]]:
    """The model of what stands at a path, or None and everything that is wrong with it.

    values: what to validate in place of the value at the path, e.g. a strategy's part of a section. Types are exact:
    no text becomes a number.
    """
    value = located.at(path) if values is None else values
    try:
        return model.model_validate(value, strict=True), []
    except ValidationError as error:
        found: dict[KeyPath, Problem] = {}
        for item in error.errors():
            relative, problem = _problem(item, model, value, located, path)
            # A union reports each of its branches: one sentence names them all.
            found.setdefault(relative, problem)
        # Of a section or list that only some of the branches take, what is wrong inside it says more.
        inner = {path[:length] for path in found for length in range(len(path))}
        return None, [problem for path, problem in found.items() if path not in inner]


def _problem(item: Any, model: type[BaseModel], value: Any, located: Located, root: KeyPath) -> tuple[KeyPath, Problem]:
    relative, is_missing = _path_in(value, item["loc"]), item["type"] == "missing"
    if is_missing and isinstance(item["loc"][-1], str):
        missing = (*relative, item["loc"][-1])
        annotation, metadata = field_at(model, missing)
        description = _description(model, missing)
        message = f"is missing; write {expected(annotation, metadata)}{f' ({description})' if description else ''}"
        return missing, Problem(located.place(root + relative).key, dotted(root + missing), message)
    path, place = root + relative, located.place(root + relative)
    if item["type"] == "extra_forbidden":
        known = keys_of(_section(model, relative[:-1]))
        return relative, unknown_key(located, path, (str(key) for key in known))
    if item["type"] == "value_error":
        return relative, Problem(place.value, dotted(path), str(item["ctx"]["error"]))
    annotation, metadata = field_at(model, relative)
    found = located.at(path)
    message = f"must be {expected(annotation, metadata)}, got {given(found)}{remedy(found, annotation, place)}"
    return relative, Problem(place.value, dotted(path), message)


def unknown_key(located: Located, path: KeyPath, known: Iterable[str]) -> Problem:
    """The problem of a key that its section does not have, with the nearest one that it does, or where it belongs."""
    key, known = str(path[-1]), set(known)
    homes = _homes().get(key, ())
    if homes and not get_close_matches(key, known, n=1, cutoff=0.6):
        hint = f"; it belongs under {' or '.join(homes)}"
    else:
        hint = suggestion(key, known)
    return Problem(located.place(path).key, dotted(path), f"unknown key{hint}")


def unknown_name(located: Located, path: KeyPath, what: str, name: str, known: Iterable[str]) -> Problem:
    """The problem of a value that should be the name of something, e.g. of a selection strategy."""
    return Problem(located.place(path).value, dotted(path), f"there is no {what} '{name}'{suggestion(name, known)}")


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems by line and column, each once; those without a line, from flags, last."""

    def position(problem: Problem) -> tuple[int, int, int]:
        match = re.search(r":([0-9]+):([0-9]+)$", problem.location)
        return (0, int(match[1]), int(match[2])) if match else (1, 0, 0)

    return sorted(dict.fromkeys(problems), key=position)


def _path_in(value: Any, loc: tuple[Any, ...]) -> KeyPath:
    """The parts of a pydantic error's place that exist in the data; the others are names of union branches."""
    path: list[str | int] = []
    for part in loc:
        is_entry = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_entry or (isinstance(value, dict) and part in value):
            value = value[part]
            path.append(part)
    return tuple(path)


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    return section_in(field_at(model, path)[0]) or model


def _description(model: type[BaseModel], path: KeyPath) -> str:
    field = keys_of(_section(model, path[:-1])).get(path[-1])
    return (field.description or "").rstrip(".") if field else ""


@lru_cache(maxsize=1)
def _homes() -> dict[str, tuple[str, ...]]:
    """Every key of a recipe and the sections that have it."""
    homes: dict[str, list[str]] = {}

    def visit(model: type[BaseModel], path: tuple[str, ...]) -> None:
        for key, field in keys_of(model).items():
            homes.setdefault(str(key), []).append(".".join(path) or "the top level")
            inner = section_in(field.annotation)
            if inner is not None:
                visit(inner, (*path, str(key), "NAME") if is_by_name(field.annotation) else (*path, str(key)))

    visit(Recipe, ())
    return {key: tuple(sections) for key, sections in homes.items()}
