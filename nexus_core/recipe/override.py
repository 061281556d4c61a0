"""`--set train.max_steps=100`: single keys of a recipe given on the command line, before anything is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nexus_core.errors import Problem, RecipeError
from nexus_core.recipe.located import KeyPath, Located, Place, dotted, read_yaml


def override(located: Located, assignments: Sequence[str], root: KeyPath = ()) -> list[Problem]:
    """Put `KEY=VALUE` assignments into what was read; returns those that cannot be put anywhere.

    KEY is a dotted path, list positions count from 0 (one past the end appends); VALUE is YAML. Unknown keys are put
    in like known ones: the schema refuses them, with this assignment as their place. root: where KEY begins.
    """
    problems = []
    for assignment in assignments:
        where = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(where, "", "has no key and value; write --set KEY=VALUE"))
            continue
        try:
            value = read_yaml(text, where)
        except RecipeError as error:
            problems += [Problem(where, key, problem.message) for problem in error.problems]
            continue
        problems += [Problem(where, key, problem.message) for problem in value.problems]
        path, message = _put(located, [*root, *key.strip().split(".")], value.value)
        if message:
            problems.append(Problem(where, key, message))
            continue
        for old in [known for known in located.places if known[: len(path)] == path]:
            del located.places[old]
        for length in range(1, len(path)):  # sections that did not exist before
            located.places.setdefault(path[:length], Place(where, where))
        for inner, place in value.places.items():
            located.places[path + inner] = Place(where, where, place.written)
    return problems


def _put(located: Located, parts: list[str | int], value: Any) -> tuple[KeyPath, str]:
    """Store a value; its path, and what is wrong if it cannot be stored."""
    if not isinstance(located.value, dict):
        return (), ""  # reported by the schema
    container: Any = located.value
    path: KeyPath = ()
    for position, part in enumerate(parts):
        if isinstance(container, list):
            part, message = _index(str(part), container, path)
            if message:
                return path, message
        elif not isinstance(container, dict):
            return path, f"cannot be set: {dotted(path)} is a single value, not a section"
        path = (*path, part)
        is_last = position == len(parts) - 1
        if isinstance(container, list) and part == len(container):
            container.append(None)
        if is_last:
            container[part] = value
        else:
            held = container.get(part) if isinstance(container, dict) else container[part]
            if held is None:
                container[part] = held = {}
            container = held
    return path, ""


def _index(part: str, items: list[Any], path: KeyPath) -> tuple[int, str]:
    if part.isdecimal() and int(part) <= len(items):
        return int(part), ""
    count = f"{len(items)} {'entry' if len(items) == 1 else 'entries'}"
    return 0, f"cannot be set: {dotted(path)} has {count}, numbered from 0; write {dotted((*path, 0))}"
