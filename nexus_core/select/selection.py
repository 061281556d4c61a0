"""The chosen experts of every layer, and `selection.json`, the file that holds them."""

# E experts, L layers

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nexus_core.errors import SelectionError
from nexus_core.recipe.schema import Cumulative
from nexus_core.select.ranking import Ranking

FILE_NAME = "selection.json"

# Numbers of experts at which the cumulative importance is told, and that `auto` picks from.
MARKS = (4, 8, 16, 24)

# How the importance that the top 4 experts hold falls: pattern, its lower bound, and the experts it takes to cover it.
PATTERNS = (("steep", 0.70, 4), ("moderate", 0.50, 8), ("gradual", 0.35, 16), ("even", 0.0, 24))

Index = Annotated[int, Field(ge=0)]


# Cumulative importance this far below the wanted share reaches it: shares add up to 1 but for rounding.
ROUNDING = 1e-9


class _Stored(BaseModel):
    # Other programs may add keys of their own; ours are checked.
    model_config = ConfigDict(extra="ignore", frozen=True)


# How many experts of a layer are taken.
TopK = int | Literal["auto"] | Cumulative


class LayerSelection(_Stored):
    """One layer's chosen experts, the first that the strategy would take first, and what they were chosen by.

    importance (E,): of every expert, sums to 1. explained_variance: see `Ranking`. top_share: importance that the first
    4, 8, 16 and 24 experts hold, by that number. pattern: how steeply importance falls. A file written by hand needs
    only `layer` and `experts`.
    """

    layer: Index
    experts: Annotated[tuple[Index, ...], Field(min_length=1)]
    importance: tuple[float, ...] = ()
    explained_variance: tuple[float, ...] = ()
    top_share: dict[str, float] = {}
    pattern: str | None = None
    recommended_top_k: int | None = None

    @model_validator(mode="after")
    def _experts_are_distinct(self) -> LayerSelection:
        repeated = sorted({expert for expert in self.experts if self.experts.count(expert) > 1})
        if repeated:
            raise ValueError(f"layer {self.layer} names expert {repeated[0]} more than once")
        return self


class Selection(_Stored):
    """The chosen experts of all layers, ascending by layer.

    top_k: as asked for: a number, one per layer, "auto" or a share of the importance. tokens: how many the statistics
    were collected over. model: the name
    collect was given, of a folder its last part. statistics: the folder they came from, relative to the one this
    selection lies in.
    """

    strategy: str
    top_k: TopK | tuple[Index, ...]
    layers: Annotated[tuple[LayerSelection, ...], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    seed: int = 0
    tokens: int | None = None
    model: str | None = None
    statistics: str | None = None

    @model_validator(mode="after")
    def _layers_ascend(self) -> Selection:
        layers = [layer.layer for layer in self.layers]
        if sorted(set(layers)) != layers:
            raise ValueError(f"layers must be distinct and ascending, not {layers}")
        return self

    @property
    def importance_LE(self) -> np.ndarray:
        """The importance of every expert of every layer (L, E)."""
        return np.array([layer.importance for layer in self.layers])


def choose_experts(layer: int, ranking: Ranking, top_k: TopK) -> LayerSelection:
    """The first experts of a layer in the strategy's order, with what their importance says about the layer.

    top_k: how many; "auto" takes as many as the layer's pattern recommends, `Cumulative` the fewest that hold its share
    of the importance. Raises SelectionError if the layer has fewer.
    """
    importance_E = ranking.importance
    experts = len(importance_E)
    order_E = np.argsort(-importance_E, kind="stable") if ranking.order is None else np.array(ranking.order)
    cumulative_E = np.cumsum(importance_E[order_E])
    top_share = {str(mark): min(1.0, float(cumulative_E[min(mark, experts) - 1])) for mark in MARKS}
    pattern, recommended = pattern_of(top_share["4"])
    recommended = min(recommended, experts)
    if isinstance(top_k, Cumulative):
        taken = min(int(np.searchsorted(cumulative_E, top_k.cumulative - ROUNDING)) + 1, experts)
    else:
        taken = recommended if top_k == "auto" else top_k
    if taken > experts:
        raise SelectionError(
            f"top_k is {taken}, but layer {layer} has {experts} experts; choose at most {experts}, or 'auto'"
        )
    return LayerSelection(
        layer=layer,
        experts=tuple(int(expert) for expert in order_E[:taken]),
        importance=tuple(float(share) for share in importance_E),
        explained_variance=ranking.explained_variance,
        top_share=top_share,
        pattern=pattern,
        recommended_top_k=recommended,
    )


def describe_top_k(top_k: TopK | Sequence[int]) -> str:
    """How many experts were asked for, in words as short as a plot's title needs."""
    if isinstance(top_k, Cumulative):
        return f"{top_k.cumulative:.0%} of the importance"
    return str(top_k) if isinstance(top_k, int | str) else f"{min(top_k)} to {max(top_k)}"


def pattern_of(top_4_share: float) -> tuple[str, int]:
    """The name of a distribution by what its top 4 experts hold, and how many experts it takes to cover it.

    Above 0.70 steep, 4; from 0.50 moderate, 8; from 0.35 gradual, 16; below even, 24.
    """
    steepest, *others = PATTERNS
    if top_4_share > steepest[1]:
        return steepest[0], steepest[2]
    return next((name, experts) for name, bound, experts in others if top_4_share >= bound)


def write_selection(selection: Selection, folder: Path) -> Path:
    """Write `selection.json` into a folder and return its path."""
    path = folder / FILE_NAME
    stored = selection.model_dump(mode="json", exclude_none=True)
    layers = ",\n".join(f"    {json.dumps(layer)}" for layer in stored.pop("layers"))
    head = json.dumps({"strategy": stored.pop("strategy"), "top_k": stored.pop("top_k"), **stored}, indent=2)
    # One line per layer: 36 layers of 128 experts stay readable, and two selections can be compared with diff.
    path.write_text(f'{head.removesuffix("}").rstrip()},\n  "layers": [\n{layers}\n  ]\n}}\n')
    return path


def read_selection(path: Path) -> Selection:
    """The selection in a file, or in the folder that holds `selection.json`.

    Raises SelectionError if it cannot be read, with the place of the first thing that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        text = path.read_text()
    except OSError as error:
        raise SelectionError(f"{path}: cannot be read: {error.strerror}; `nexus select` writes this file") from error
    except UnicodeDecodeError as error:
        raise SelectionError(f"{path}: is not a text file; `nexus select` writes {FILE_NAME}") from error
    try:
        return Selection.model_validate_json(text)
    except ValidationError as error:
        raise SelectionError(f"{path}: {_first_problem(error)}; `nexus select` writes this file") from error


def check_selection(selection: Selection, layers: Sequence[int], experts: int, where: str, model: str) -> None:
    """Raise SelectionError unless a selection fits a model with these MoE layers and experts per layer.

    where: the selection's file, model: its name; both for the error.
    """
    remedy = f"select from statistics of this model: nexus collect {model} ..., then nexus select"
    if selection.model:
        where = f"{where}, made for '{selection.model}'"
    chosen = [layer.layer for layer in selection.layers]
    for layer in layers:
        if layer not in chosen:
            raise SelectionError(f"{where}: has no layer {layer}, which '{model}' has; {remedy}")
    for entry in selection.layers:
        if entry.layer not in layers:
            raise SelectionError(f"{where}: selects in layer {entry.layer}, where '{model}' has no experts; {remedy}")
        if entry.importance and len(entry.importance) != experts:
            raise SelectionError(
                f"{where}: layer {entry.layer} ranks {len(entry.importance)} experts, but '{model}' has {experts}; "
                f"{remedy}"
            )
        if max(entry.experts) >= experts:
            raise SelectionError(
                f"{where}: layer {entry.layer} selects expert {max(entry.experts)}, but '{model}' has experts "
                f"0-{experts - 1}; {remedy}"
            )


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
