"""Selection strategies: each against a slow, obvious version."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from router_statistics import probabilities, rank, statistics_of
from sklearn.decomposition import PCA as SklearnPCA

from nexus_core.errors import ShapeError
from nexus_core.select import STRATEGIES, LayerSelection, Selection, choose_experts
from nexus_core.select.kmeans import KmeansParameters
from nexus_core.select.overlap import explained_share, overlap, overlap_by_chance, routed_share
from nexus_core.select.pca import PcaParameters, pca

# T tokens, E experts


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


def test_saliency_is_the_mean_over_an_experts_own_tokens() -> None:
    statistics = replace(
        statistics_of(probabilities(100, 4)),
        topk_count=np.array([10, 1, 0, 4]),
        output_norm_sum=np.array([20.0, 5.0, 0.0, 4.0]),
    )

    # 2, 5, nothing and 1 a token: a loud expert counts, however seldom it is asked
    assert rank("saliency", statistics).importance == pytest.approx([2 / 8, 5 / 8, 0, 1 / 8])


def test_saliency_without_norms_is_refused() -> None:
    with pytest.raises(ShapeError, match="layer 0: the statistics hold no norms"):
        rank("saliency", replace(statistics_of(probabilities(100, 8)), output_norm_sum=None))


@pytest.mark.parametrize("seed", range(3))
def test_diverse_takes_what_explains_most_of_what_the_earlier_ones_leave(seed: int) -> None:
    probabilities_TE = probabilities(600, 12, seed)
    centred_TE = probabilities_TE - probabilities_TE.mean(axis=0)

    def left_over(experts: list[int]) -> float:
        """Variance that linear regression on these experts' probabilities does not explain."""
        basis_TK = centred_TE[:, experts]
        fit_TE = basis_TK @ np.linalg.lstsq(basis_TK, centred_TE, rcond=None)[0]
        return float(np.square(centred_TE - fit_TE).sum())

    expected: list[int] = []
    shares = []
    total = before = float(np.square(centred_TE).sum())
    for _ in range(5):
        rest = [expert for expert in range(12) if expert not in expected]
        expected.append(min(rest, key=lambda expert: left_over([*expected, expert])))
        shares.append((before - left_over(expected)) / total)
        before = left_over(expected)

    ranking = rank("diverse", statistics_of(probabilities_TE))

    assert choose_experts(0, ranking, 5).experts == tuple(expected)
    assert ranking.importance[expected] == pytest.approx(shares, abs=1e-9)


def test_diverse_does_not_take_two_experts_that_do_the_same_work() -> None:
    probabilities_TE = probabilities(400, 8)
    loudest = int(np.argmax(probabilities_TE.var(axis=0)))
    twins_TE = np.column_stack([probabilities_TE, probabilities_TE[:, loudest]])

    chosen = choose_experts(0, rank("diverse", statistics_of(twins_TE)), 6).experts

    assert loudest in chosen
    assert 8 not in chosen


def test_kmeans_takes_one_expert_of_every_group() -> None:
    generator = np.random.default_rng(0)
    groups_TG = generator.random((500, 4))
    # Experts 0-2, 3-5, 6-8 and 9-11 go up and down together; the last of each group follows its group most closely.
    noise_E = np.tile([0.2, 0.1, 0.0], 4)
    probabilities_TE = np.repeat(groups_TG, 3, axis=1) + noise_E * generator.normal(size=(500, 12))
    statistics = replace(statistics_of(probabilities_TE), wanted=4)

    ranking = rank("kmeans", statistics)

    chosen = choose_experts(0, ranking, 4).experts
    assert sorted(expert // 3 for expert in chosen) == [0, 1, 2, 3]
    groups = [statistics.covariance.diagonal()[3 * (expert // 3) :][:3].sum() for expert in chosen]
    assert groups == sorted(groups, reverse=True)
    assert ranking.importance[list(chosen)].sum() == pytest.approx(1)


def test_kmeans_repeats_with_its_seed_and_takes_the_clusters_it_is_told() -> None:
    statistics = statistics_of(probabilities(300, 16))
    strategy = next(strategy for strategy in STRATEGIES if strategy.name == "kmeans")
    parameters = KmeansParameters(clusters=5)

    one, other = (strategy.function(statistics, parameters, np.random.default_rng(3)) for _ in range(2))

    assert one.order == other.order
    assert (one.importance > 0).sum() == 5
    assert sorted(one.order) == list(range(16))


def test_kmeans_of_a_router_that_never_varies_finds_one_group() -> None:
    assert (rank("kmeans", statistics_of(np.full((50, 8), 1 / 8))).importance > 0).sum() == 1


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


def test_overlap_is_the_share_of_experts_that_both_choose_of_all_that_either_does() -> None:
    def selection(*experts: tuple[int, ...]) -> Selection:
        layers = tuple(LayerSelection(layer=layer, experts=chosen) for layer, chosen in enumerate(experts))
        return Selection(strategy="x", top_k=2, layers=layers)

    found_LSS = overlap([selection((0, 1), (2, 3)), selection((1, 0), (3, 4)), selection((5, 6, 7, 8), (2, 3))])

    np.testing.assert_allclose(found_LSS[0], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(found_LSS[1], [[1, 1 / 3, 1], [1 / 3, 1, 1 / 3], [1, 1 / 3, 1]])
    assert overlap_by_chance(32, 8, 8) == pytest.approx(2 / 14)


def test_what_chosen_experts_stand_for_is_their_tokens_and_what_their_probabilities_explain() -> None:
    probabilities_TE = probabilities(400, 10)
    statistics = statistics_of(probabilities_TE)
    centred_TE = probabilities_TE - probabilities_TE.mean(axis=0)
    fit_TE = centred_TE[:, [7, 2]] @ np.linalg.lstsq(centred_TE[:, [7, 2]], centred_TE, rcond=None)[0]

    assert routed_share(statistics, (7, 2)) == pytest.approx(statistics.topk_count[[2, 7]].sum() / (400 * 4))
    assert explained_share(statistics, (7, 2)) == pytest.approx(np.square(fit_TE).sum() / np.square(centred_TE).sum())
    assert explained_share(statistics, range(10)) == pytest.approx(1)
    assert explained_share(statistics_of(np.full((50, 8), 1 / 8)), (0,)) == 1
