"""Nested settings and reports as the flat names and short values that MLflow keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# MLflow takes 6,000 characters since 2.10, servers before that 500; the whole recipe is kept as an artifact anyway.
MAX_VALUE_CHARACTERS = 500
MAX_NAME_CHARACTERS = 250

HEADLINES = ("perplexity/", "change/", "router/")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to plain values: {"train": {"losses": {"lm": 1}}} is {"train.losses.lm": 1}.

    Lists of mappings are numbered (`data.domain.0.path`); other lists and empty mappings are values.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value
    return flat


def parameter_value(value: Any) -> str:
    """A setting as text, cut to what every MLflow server takes."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, Mapping | Sequence):
        text = json.dumps(value, default=str)
    else:
        text = str(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


def field_name(name: str) -> str:
    """The name with what MLflow refuses replaced: other characters than letters, digits, `_-.:/` and space, and path
    segments that are empty or dots."""
    segments = re.sub(r"[^/\w.\- :]", "_", name).split("/")
    kept = "/".join(segment for segment in segments if segment not in ("", ".", ".."))
    return kept[:MAX_NAME_CHARACTERS].rstrip("/") or "_"


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers (or true and false, as 1 and 0), under names that MLflow takes."""
    return {field_name(name): float(value) for name, value in values.items() if isinstance(value, int | float)}


def headline(stage: str, final: Mapping[str, Any]) -> dict[str, float]:
    """A stage's final numbers as the recipe's run has them: what runs are compared by keeps its name
    (`perplexity/SET/student`, `change/SET`, `router/l1`), the rest gets the stage's (`train/loss`)."""
    return numbers({name if name.startswith(HEADLINES) else f"{stage}/{name}": value for name, value in final.items()})


def set_roles(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the data sets that a resolved recipe learns, and of those it keeps; see `Recipe.learnt_sets`."""
    train = settings.get("train", {})
    trained = list(train.get("data") or settings.get("data") or {})
    learnt = train.get("learn")
    learnt = list(learnt) if learnt is not None else trained[:1]
    return learnt, [name for name in trained if name not in learnt]
