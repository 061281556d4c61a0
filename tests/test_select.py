"""Selection strategies: each against a slow, obvious version, and the file they end up in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA as SklearnPCA

from nexus_core.errors import SelectionError, ShapeError
from nexus_core.select import (
    STRATEGIES,
    LayerSelection,
    LayerStatistics,
    Ranking,
    Selection,
    choose_experts,
    read_selection,
    write_selection,
)
from nexus_core.select.pca import PcaParameters, pca
from nexus_core.select.selection import check_selection, pattern_of

# T tokens, E experts


def probabilities(tokens: int, experts: int, seed: int = 0) -> np.ndarray:
    """A softmax (T, E) whose logits depend on a few shared factors, as a real router's do."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(tokens, 6)) @ (
        generator.normal(size=(6, experts)) * generator.gamma(1, 1, experts)
    )
    logits_TE = factors + generator.normal(size=experts) + 0.3 * generator.normal(size=(tokens, experts))
    exponentials_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return exponentials_TE / exponentials_TE.sum(axis=1, keepdims=True)


def statistics_of(probabilities_TE: np.ndarray, top_k: int = 4) -> LayerStatistics:
    tokens, experts = probabilities_TE.shape
    chosen_TK = np.argsort(-probabilities_TE, axis=1)[:, :top_k]
    weights_TK = np.take_along_axis(probabilities_TE, chosen_TK, axis=1)
    weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True)
    return LayerStatistics(
        layer=0,
        tokens=tokens,
        mean=probabilities_TE.mean(axis=0),
        covariance=np.cov(probabilities_TE.T),
        topk_count=np.bincount(chosen_TK.ravel(), minlength=experts),
        gate_mass=np.bincount(chosen_TK.ravel(), weights=weights_TK.ravel(), minlength=experts),
    )


def rank(name: str, statistics: LayerStatistics, seed: int = 0) -> Ranking:
    strategy = next(strategy for strategy in STRATEGIES if strategy.name == name)
    parameters = strategy.parameters() if strategy.parameters else None
    return strategy.function(statistics, parameters, np.random.default_rng(seed))


@pytest.mark.parametrize(("tokens", "experts"), [(3000, 32), (5000, 128), (12, 32), (200, 4)])
@pytest.mark.parametrize("components", [1, 5, 20])
def test_pca_importance_is_sklearns_on_the_full_probability_matrix(tokens: int, experts: int, components: int) -> None:
    probabilities_TE = probabilities(tokens, experts)
    used = min(components, experts, tokens - 1)
    reference = SklearnPCA(n_components=used, svd_solver="full").fit(probabilities_TE)
    expected_E = np.abs(reference.components_).T @ reference.explained_variance_ratio_
    expected_E = expected_E / expected_E.sum()

    ranking = pca(statistics_of(probabilities_TE), PcaParameters(components=components), np.random.default_rng(0))

    np.testing.assert_allclose(ranking.importance, expected_E, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ranking.explained_variance, reference.explained_variance_ratio_, rtol=0, atol=1e-9)
    top_k = min(24, experts)
    assert choose_experts(0, ranking, top_k).experts == tuple(np.argsort(-expected_E, kind="stable")[:top_k])


def test_pca_of_a_router_that_never_varies_ranks_all_experts_equal() -> None:
    ranking = rank("pca", statistics_of(np.full((50, 8), 1 / 8)))

    assert ranking.importance == pytest.approx(np.full(8, 1 / 8))
    assert choose_experts(0, ranking, 3).experts == (0, 1, 2)


def test_frequency_and_gate_mass_are_shares_of_tokens_and_of_weight() -> None:
    statistics = statistics_of(probabilities(500, 16), top_k=2)

    assert rank("frequency", statistics).importance == pytest.approx(statistics.topk_count / (500 * 2))
    assert rank("gate_mass", statistics).importance == pytest.approx(statistics.gate_mass / 500)


def test_random_ignores_the_router_and_repeats_with_its_seed() -> None:
    one, other = statistics_of(probabilities(100, 16, seed=1)), statistics_of(probabilities(100, 16, seed=2))

    assert rank("random", one, seed=5).importance == pytest.approx(rank("random", other, seed=5).importance)
    assert choose_experts(0, rank("random", one, 5), 8).experts != choose_experts(0, rank("random", one, 6), 8).experts


@pytest.mark.parametrize("strategy", [strategy.name for strategy in STRATEGIES])
def test_every_importance_is_a_distribution_over_the_experts(strategy: str) -> None:
    importance_E = rank(strategy, statistics_of(probabilities(400, 32))).importance

    assert importance_E.shape == (32,)
    assert (importance_E >= 0).all()
    assert importance_E.sum() == pytest.approx(1, abs=1e-12)


def test_damaged_statistics_are_refused() -> None:
    statistics = statistics_of(probabilities(100, 8))
    statistics.gate_mass[3] = np.nan

    with pytest.raises(ShapeError, match="damaged"):
        rank("gate_mass", statistics)


def test_experts_are_listed_by_importance_and_ties_by_index() -> None:
    ranking = Ranking(np.array([0.1, 0.3, 0.1, 0.3, 0.2]))

    assert choose_experts(0, ranking, 4).experts == (1, 3, 4, 0)


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
