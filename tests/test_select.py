"""How many experts are taken from a ranking, and the file they end up in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from router_statistics import probabilities, rank, statistics_of

from nexus_core.errors import SelectionError
from nexus_core.recipe.schema import Cumulative
from nexus_core.select import (
    LayerSelection,
    Ranking,
    Selection,
    choose_experts,
    read_selection,
    write_selection,
)
from nexus_core.select.selection import check_selection, pattern_of


def test_experts_are_listed_by_importance_and_ties_by_index() -> None:
    ranking = Ranking(np.array([0.1, 0.3, 0.1, 0.3, 0.2]))

    assert choose_experts(0, ranking, 4).experts == (1, 3, 4, 0)


def test_a_strategy_that_takes_experts_in_turn_keeps_its_order() -> None:
    ranking = Ranking(np.array([0.2, 0.5, 0.3]), order=(0, 2, 1))

    assert choose_experts(0, ranking, 2).experts == (0, 2)


@pytest.mark.parametrize(
    ("share", "experts"), [(0.3, (1,)), (0.5, (1,)), (0.51, (1, 3)), (0.75, (1, 3)), (0.9, (1, 3, 0)), (1.0, (1, 3, 0))]
)
def test_cumulative_takes_the_fewest_experts_that_hold_the_share(share: float, experts: tuple[int, ...]) -> None:
    ranking = Ranking(np.array([0.25 - 1e-9, 0.5, 0.0, 0.25 + 1e-9]))

    assert choose_experts(0, ranking, Cumulative(cumulative=share)).experts == experts


@pytest.mark.parametrize(
    ("share", "pattern", "experts"),
    [
        (0.71, "steep", 4),
        (0.70, "moderate", 8),
        (0.50, "moderate", 8),
        (0.499, "gradual", 16),
        (0.35, "gradual", 16),
        (0.349, "even", 24),
        (0.03, "even", 24),
    ],
)
def test_auto_follows_what_the_top_4_experts_hold(share: float, pattern: str, experts: int) -> None:
    assert pattern_of(share) == (pattern, experts)


@pytest.mark.parametrize(("share", "experts"), [(0.8, 4), (0.6, 8), (0.4, 16), (0.2, 24)])
def test_auto_chooses_what_it_recommends(share: float, experts: int) -> None:
    importance_E = np.concatenate([np.full(4, share / 4), np.full(96, (1 - share) / 96)])

    chosen = choose_experts(0, Ranking(importance_E), "auto")

    assert len(chosen.experts) == chosen.recommended_top_k == experts


def test_auto_never_takes_more_experts_than_the_layer_has() -> None:
    chosen = choose_experts(0, Ranking(np.full(12, 1 / 12)), "auto")

    assert chosen.recommended_top_k == 12
    assert chosen.experts == tuple(range(12))
    assert chosen.top_share == {"4": pytest.approx(1 / 3), "8": pytest.approx(2 / 3), "16": 1.0, "24": 1.0}


def test_more_experts_than_the_layer_has_are_refused_with_both_numbers() -> None:
    with pytest.raises(SelectionError, match=r"top_k is 33, but layer 7 has 32 experts"):
        choose_experts(7, Ranking(np.full(32, 1 / 32)), 33)


def test_selection_file_has_the_documented_keys_and_reads_back(tmp_path: Path) -> None:
    layers = tuple(
        choose_experts(layer, rank("pca", statistics_of(probabilities(300, 32, layer))), 8) for layer in (0, 3)
    )
    selection = Selection(strategy="pca", top_k=8, layers=layers, tokens=300, statistics="../stats")

    path = write_selection(selection, tmp_path)

    stored = json.loads(path.read_text())
    assert list(stored)[:2] == ["strategy", "top_k"]
    assert list(stored["layers"][0]) == [
        "layer",
        "experts",
        "importance",
        "explained_variance",
        "top_share",
        "pattern",
        "recommended_top_k",
    ]
    assert len(stored["layers"][0]["importance"]) == 32
    assert read_selection(path) == read_selection(tmp_path) == selection


def test_a_selection_by_hand_needs_only_layers_and_experts(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"strategy": "mine", "top_k": 2, "layers": [{"layer": 0, "experts": [3, 1]}]}')

    assert read_selection(file).layers[0].experts == (3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "nexus select"),
        ('{"top_k": 2, "layers": []}', "strategy: Field required"),
        ('{"strategy": "x", "top_k": 2, "layers": [{"layer": 0, "experts": []}]}', r"layers\[0\].experts"),
        (
            '{"strategy": "x", "top_k": 2, "layers": [{"layer": 4, "experts": [1, 1]}]}',
            "layer 4 names expert 1 more than",
        ),
        (
            '{"strategy": "x", "top_k": 1, "layers": [{"layer": 1, "experts": [0]}, {"layer": 0, "experts": [0]}]}',
            "ascending",
        ),
    ],
)
def test_a_broken_selection_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "selection.json"
    file.write_text(text)

    with pytest.raises(SelectionError, match=message) as error:
        read_selection(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("top_k", ["auto", 8, (2, 3), Cumulative(cumulative=0.8)])
def test_what_was_asked_for_is_written_down_as_it_was(tmp_path: Path, top_k: Any) -> None:
    layers = tuple(LayerSelection(layer=layer, experts=(0, 1)) for layer in range(2))
    selection = Selection(strategy="x", top_k=top_k, layers=layers)

    assert read_selection(write_selection(selection, tmp_path)).top_k == top_k


def test_a_missing_selection_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="cannot be read"):
        read_selection(tmp_path / "selection.json")


@pytest.mark.parametrize(
    ("layers", "experts", "message"),
    [
        ((0, 1), 8, "has no layer 1"),
        ((), 8, "selects in layer 0, where"),
        ((0,), 5, "layer 0 ranks 8 experts, but 'model' has 5"),
    ],
)
def test_a_selection_of_another_model_is_refused(layers: tuple[int, ...], experts: int, message: str) -> None:
    chosen = LayerSelection(layer=0, experts=(5,), importance=(1 / 8,) * 8)
    selection = Selection(strategy="x", top_k=1, layers=(chosen,))

    with pytest.raises(SelectionError, match=message):
        check_selection(selection, layers, experts, "selection.json", "model")


def test_an_expert_that_the_model_does_not_have_is_refused_with_the_range_it_has() -> None:
    selection = Selection(strategy="x", top_k=1, layers=(LayerSelection(layer=7, experts=(3, 32)),))

    with pytest.raises(SelectionError, match=r"layer 7 selects expert 32, but 'model' has experts 0-31; select from"):
        check_selection(selection, (7,), 32, "selection.json", "model")
