"""What no single key can tell: names that must exist elsewhere, settings that exclude each other or the model."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from nexus_core.errors import Problem, suggestion
from nexus_core.plugins import installed
from nexus_core.recipe.explain import unknown_name
from nexus_core.recipe.located import KeyPath, Located, dotted
from nexus_core.recipe.schema import GENERATED, Recipe
from nexus_core.recipe.training import Train
from nexus_core.types import MergeRequest, MoeDescription

AUTO_FORMAT = "auto"


def check_names(located: Located) -> list[Problem]:
    """Data sets, formats and losses that a recipe names but that do not exist.

    Works on what was given rather than on a valid recipe, so that it reports beside other problems.
    """
    sets = _mapping(located, ("data",))
    problems = _data_sets(located, sets)
    shares = {section: _mapping(located, (section, "data")) for section in ("collect", "train")}
    for section, names in shares.items():
        for name in names:
            if sets and name not in sets:
                path: KeyPath = (section, "data", name)
                message = f"there is no data set '{name}' under data{suggestion(name, sets)}"
                problems.append(Problem(located.place(path).key, dotted(path), message))
        if located.at((section, "data")) == {}:
            problems.append(
                _at(located, (section, "data"), "names no data set; name one, or remove the key to use all")
            )
    problems += _learn(located, shares["train"], sets)
    return problems + _generated(located, sets) + _losses(located)


def check_execution(located: Located) -> list[Problem]:
    """Ways of running that this machine does not have, or that leave processes without work."""
    problems = []
    deepspeed, processes = _mapping(located, ("run", "deepspeed")), located.at(("run", "processes"))
    if deepspeed and deepspeed.get("zero_stage") != 0 and find_spec("deepspeed") is None:
        message = "needs the package deepspeed, which is not installed; install it, or remove the key"
        problems.append(_at(located, ("run", "deepspeed"), message))
    batch_size, accumulation = (
        _mapping(located, ("train",)).get(name, Train.model_fields[name].default)
        for name in ("batch_size", "gradient_accumulation")
    )
    counts = (processes, batch_size, accumulation)
    if all(isinstance(count, int) and count > 0 for count in counts) and processes > batch_size * accumulation:
        message = (
            f"is {processes}, but a step has {batch_size * accumulation} sequences to share (train.batch_size "
            f"{batch_size} x train.gradient_accumulation {accumulation}); write at most as many, or raise one of these"
        )
        problems.append(_at(located, ("run", "processes"), message))
    return problems


def check_against_model(recipe: Recipe, description: MoeDescription) -> list[Problem]:
    """What of a recipe does not fit the model it names; empty if all does."""
    problems = []
    if not description.layers:
        message = f"{recipe.model.path} has no layer with routed experts; NEXUS needs a mixture-of-experts model"
        problems.append(Problem(recipe.location("model.path"), "model.path", message))
    if description.shared_expert_width:
        message = (
            f"{recipe.model.path} already has a shared expert ({description.shared_expert_width} neurons wide); "
            "give the untouched base"
        )
        problems.append(Problem(recipe.location("model.path"), "model.path", message))
    return problems + _top_k(recipe, description)


def _top_k(recipe: Recipe, description: MoeDescription) -> list[Problem]:
    top_k, layers = recipe.select.top_k, len(description.layers)
    problems = []
    if isinstance(top_k, list) and layers and len(top_k) != layers:
        message = (
            f"is a list of {len(top_k)}, but {recipe.model.path} has {layers} layers with experts; write one number "
            "for each, or one for all"
        )
        problems.append(Problem(recipe.location("select.top_k"), "select.top_k", message))
    numbers = {f"select.top_k.{index}": number for index, number in enumerate(top_k)} if isinstance(top_k, list) else {}
    if isinstance(top_k, int):
        numbers = {"select.top_k": top_k}
    for key, number in numbers.items():
        if number > description.experts:
            message = (
                f"is {number}, but a layer of {recipe.model.path} has {description.experts} experts; "
                f"write at most {description.experts}, or auto"
            )
            problems.append(Problem(recipe.location(key), key, message))
    return problems + _merge(recipe, description)


def _merge(recipe: Recipe, description: MoeDescription) -> list[Problem]:
    """What the chosen merge cannot do, known before statistics are collected for it."""
    section = recipe.convert
    strategy = installed().strategies("merge")[section.merge]
    if strategy.refuses is None or not description.layers:
        return []
    collected, top_k = recipe.collect.data or recipe.data, recipe.select.top_k
    request = MergeRequest(
        merge=section.merge,
        width=section.width or description.expert_width,
        expert_width=description.expert_width,
        experts=description.experts,
        chosen=min(top_k) if isinstance(top_k, list) else top_k if isinstance(top_k, int) else None,
        kept_inputs=recipe.collect.keep_inputs,
        learnt=tuple(name for name in recipe.learnt_sets if name in collected),
        kept=tuple(name for name in recipe.kept_sets if name in collected),
    )
    parameters = strategy.parameters.model_validate(section.parameters) if strategy.parameters else None
    refusal = strategy.refuses(request, parameters)
    if refusal is None:
        return []
    key = f"convert.{refusal.key}"
    return [Problem(recipe.location(key), key, refusal.message)]


def _data_sets(located: Located, sets: dict[str, Any]) -> list[Problem]:
    problems = []
    if located.at(("data",)) == {}:
        problems.append(
            _at(located, ("data",), "names no data set; give at least one, e.g. 'domain: [{path: my.jsonl}]'")
        )
    formats = {AUTO_FORMAT, *installed().strategies("data_formats")} if sets else set()
    for name, sources in sets.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            # Names become metric names, folder names and dotted paths of --set.
            message = "a data set's name is made of letters, digits, '_' and '-'; rename it"
            problems.append(Problem(located.place(("data", name)).key, f"data.{name}", message))
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            shape = source.get("format") if isinstance(source, dict) else None
            if isinstance(shape, str) and shape not in formats:
                path: KeyPath = ("data", name, index, "format")
                problems.append(unknown_name(located, path, "data format", shape, formats))
    return problems


def _generated(located: Located, sets: dict[str, Any]) -> list[Problem]:
    """Sources that read what nobody writes, and text written for no source."""
    written = _mapping(located, ("generate",))
    problems, read = [], set()
    for set_name, sources in sets.items():
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            place = source.get("path") if isinstance(source, dict) else None
            if not isinstance(place, str) or not place.startswith(GENERATED):
                continue
            name = place.removeprefix(GENERATED)
            read.add(name)
            if name not in written:
                path: KeyPath = ("data", set_name, index, "path")
                problems.append(unknown_name(located, path, "section under generate called", name, written))
    for name in written if sets else ():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            message = "is made of letters, digits, '_' and '-' only, because a file is called so; rename it"
            problems.append(Problem(located.place(("generate", name)).key, f"generate.{name}", message))
        elif name not in read:
            message = f"is read by no data set; write 'path: {GENERATED}{name}' under data, or remove it"
            problems.append(Problem(located.place(("generate", name)).key, f"generate.{name}", message))
    return problems


def _learn(located: Located, shares: dict[str, Any], sets: dict[str, Any]) -> list[Problem]:
    learn = located.at(("train", "learn"))
    if not isinstance(learn, list):
        return []
    if not learn:
        return [_at(located, ("train", "learn"), "names no data set; remove the key to learn from the first")]
    problems = []
    trained = shares or sets
    for index, name in enumerate(learn):
        path = ("train", "learn", index)
        if not isinstance(name, str) or not trained:
            continue
        if name not in trained:
            where = "train.data" if shares else "data"
            message = f"there is no data set '{name}' under {where}{suggestion(name, trained)}"
            problems.append(_at(located, path, message))
        elif name in learn[:index]:
            problems.append(_at(located, path, f"names '{name}' twice; remove one"))
    return problems


def _losses(located: Located) -> list[Problem]:
    losses = _mapping(located, ("train", "losses"))
    known = installed().strategies("losses") if losses else {}
    problems = []
    for name in losses:
        if name not in known:
            path = ("train", "losses", name)
            message = f"there is no loss '{name}'{suggestion(name, known)}"
            problems.append(Problem(located.place(path).key, dotted(path), message))
    weights = [loss.get("weight") if isinstance(loss, dict) else loss for loss in losses.values()]
    if located.at(("train", "losses")) == {} or (losses and not any(weights)):
        problems.append(_at(located, ("train", "losses"), "gives no loss a weight above 0, so nothing would be learnt"))
    return problems + _stored_teacher(located, losses)


def _stored_teacher(located: Located, losses: dict[str, Any]) -> list[Problem]:
    """Losses that a stored teacher cannot serve."""
    teacher = _mapping(located, ("train", "teacher"))
    if teacher.get("kind") != "offline":
        return []
    problems = []
    for name, reason in (
        ("hidden_match", "compares hidden states, which are not stored"),
        ("router_kl", "compares with the base's routers, which are not stored"),
    ):
        loss = losses.get(name, 0.0)
        weight = loss.get("weight") if isinstance(loss, dict) else loss
        stores = name == "router_kl" and teacher.get("routers", True) and teacher.get("path") is None
        if weight and not stores:
            message = f"{reason}{_why(name, teacher)}; give it the weight 0, or write train.teacher.kind: online"
            problems.append(_at(located, ("train", "losses", name), message))
    kl = losses.get("logits_kl")
    if isinstance(kl, dict) and kl.get("weight") and kl.get("temperature", 1.0) != 1.0:
        message = (
            f"is {kl['temperature']}, but a stored teacher knows how likely all other tokens are at 1 only; "
            "write 1.0, or train.teacher.kind: online"
        )
        problems.append(_at(located, ("train", "losses", "logits_kl", "temperature"), message))
    return problems


def _why(name: str, teacher: dict[str, Any]) -> str:
    if name != "router_kl":
        return ""
    return " with routers: false" if teacher.get("path") is None else " of another model"


def _mapping(located: Located, path: KeyPath) -> dict[str, Any]:
    value = located.at(path)
    return value if isinstance(value, dict) else {}


def _at(located: Located, path: KeyPath, message: str) -> Problem:
    return Problem(located.place(path).value, dotted(path), message)
