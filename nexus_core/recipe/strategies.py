"""Checks the strategies a recipe chooses, and writes out the parameters it left to their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_core.errors import Problem
from nexus_core.plugins import installed
from nexus_core.recipe.explain import unknown_key, unknown_name, validated
from nexus_core.recipe.located import KeyPath, Located
from nexus_core.recipe.schema import Convert, Select
from nexus_core.recipe.sections import StrategySection
from nexus_core.recipe.training import Loss, Routing, Train
from nexus_core.recipe.words import keys_of
from nexus_core.types import Strategy


@dataclass(frozen=True)
class Choice:
    """A section that chooses a strategy: which key names it, and of which kind it is."""

    path: KeyPath
    key: str
    kind: str
    section: type[StrategySection]

    @property
    def default(self) -> str:
        """The strategy of a recipe that names none."""
        return self.section.model_fields[self.key].default


LOSSES: KeyPath = ("train", "losses")

CHOICES = (
    Choice(("select",), "strategy", "selection", Select),
    Choice(("convert",), "merge", "merge", Convert),
    Choice(("train", "routing"), "strategy", "routing", Routing),
)


def default_losses(located: Located, assignments: Sequence[str], root: KeyPath = ()) -> None:
    """Write out the losses that a recipe left to their defaults if `--set` is to change one: the others stay.

    Changes `located.value`. assignments, root: as `override` gets them.
    """
    prefix = ".".join([*map(str, LOSSES[len(root) :]), ""])
    settings = located.value if isinstance(located.value, dict) else {}
    train = settings.get("train", {})
    if isinstance(train, dict) and "losses" not in train and any(a.strip().startswith(prefix) for a in assignments):
        settings["train"] = train | {"losses": dict(Train.model_fields["losses"].default)}


def complete_losses(located: Located) -> list[Problem]:
    """Everything wrong with the losses' parameters; every loss that exists becomes a section with all of its own.

    Changes `located.value`, so that a plain weight and a section of that weight mean the same to a stage's key.
    """
    settings = located.value if isinstance(located.value, dict) else {}
    train = settings.get("train", {})
    problems: list[Problem] = []
    if isinstance(train, dict) and "losses" not in train:
        settings["train"] = train | {"losses": dict(Train.model_fields["losses"].default)}
    losses = located.at(LOSSES)
    known = installed().strategies("losses") if isinstance(losses, dict) else {}
    for name, given in list(losses.items()) if isinstance(losses, dict) else ():
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        if name not in known or not (is_number or isinstance(given, dict)):
            continue  # reported by the schema and by check_names
        section = {"weight": given} if is_number else dict(given)
        parameters, found = _parameters(
            located, Choice((*LOSSES, name), "weight", "losses", Loss), known[name], section
        )
        losses[name] = section | parameters
        problems += found
    return problems


def complete(located: Located, choices: tuple[Choice, ...] = CHOICES) -> list[Problem]:
    """Everything wrong with the chosen strategies and their parameters; what is right gets its defaults filled in.

    Changes `located.value`: after this the recipe says every parameter itself.
    """
    problems = []
    for choice in choices:
        given = located.at(choice.path) if choice.path in located.places or located.at(choice.path) else {}
        if not isinstance(given, dict):
            continue  # reported by the schema
        name = given.get(choice.key, choice.default)
        if not isinstance(name, str):
            continue
        strategies = installed().strategies(choice.kind)
        if name not in strategies:
            path = (*choice.path, choice.key)
            problems.append(unknown_name(located, path, f"{choice.kind} strategy", name, strategies))
            continue
        parameters, found = _parameters(located, choice, strategies[name], given)
        problems += found
        if parameters:
            _put(located.value, choice.path, parameters)
    return problems


def _parameters(
    located: Located, choice: Choice, strategy: Strategy, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    section_keys = {str(key) for key in keys_of(choice.section)}
    own_keys = {str(key) for key in keys_of(strategy.parameters)} if strategy.parameters else set()
    extras = {key: value for key, value in given.items() if key not in section_keys}
    problems = [
        unknown_key(located, (*choice.path, key), section_keys | own_keys) for key in extras if key not in own_keys
    ]
    if strategy.parameters is None:
        return {}, problems
    own = {key: value for key, value in extras.items() if key in own_keys}
    parameters, found = validated(strategy.parameters, located, choice.path, own)
    return (parameters.model_dump(mode="json", by_alias=True) if parameters else {}), problems + found


def _put(settings: dict[Any, Any], path: KeyPath, values: Mapping[str, Any]) -> None:
    for part in path:
        if settings.get(part) is None:
            settings[part] = {}
        settings = settings[part]
    settings.update(values)
