"""Merge strategies: pure functions of experts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
import torch
from layer_experts import (
    EXPERTS,
    HIDDEN,
    SALIENCY_EF,
    WIDTH,
    activation,
    layer_experts,
    merge,
    output_of,
    permuted,
    random_expert,
    strategy_of,
)

from nexus_core.errors import SelectionError, UsageError
from nexus_core.merge import STRATEGIES, LayerExperts, apply_start, check_merged
from nexus_core.merge import experts as experts_module
from nexus_core.merge.aligned import neuron_order
from nexus_core.merge.experts import tensors
from nexus_core.merge.neurons import most_salient
from nexus_core.select import LayerSelection
from nexus_core.types import ExpertWeights

NAMES = [strategy.name for strategy in STRATEGIES]


@pytest.fixture
def hidden_TD() -> torch.Tensor:
    return torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[False, True], ids=["whole matrices", "tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether experts are read three rows at a time, or a matrix at once."""
    monkeypatch.setattr(experts_module, "TILE_NUMBERS", 3 * HIDDEN)
    return request.param


@pytest.mark.parametrize("has_biases", [True, False])
def test_mean_is_the_average_of_every_number_rounded_once(has_biases: bool, tiled: bool) -> None:
    def read(expert: int) -> ExpertWeights:
        return random_expert(expert, has_biases=has_biases)

    merged = merge("mean", (4, 1, 6), layer_experts(read, tiled=tiled))
    rounded = merge("mean", (4, 1, 6), layer_experts(read, tiled=tiled, dtype=torch.bfloat16))

    experts = [tensors(read(expert)) for expert in (4, 1, 6)]
    assert set(tensors(merged)) == set(experts[0])
    for name, tensor in tensors(merged).items():
        expected = torch.stack([expert[name].double() for expert in experts]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(tensors(rounded)[name], tensor.bfloat16())


def test_mean_reads_no_expert_that_is_not_chosen() -> None:
    asked: set[int] = set()

    def read(expert: int) -> ExpertWeights:
        asked.add(expert)
        return random_expert(expert)

    experts = layer_experts(read)
    asked.clear()
    merge("mean", (4, 1, 6), experts)

    assert asked == {4, 1, 6}


def test_weighted_is_the_average_by_importance(tiled: bool) -> None:
    importance = (0.0, 0.1, 0.0, 0.0, 0.4, 0.3, 0.2, 0.0)

    merged = merge("weighted", (4, 1, 6), layer_experts(tiled=tiled), importance=importance)

    for name, tensor in tensors(merged).items():
        expected = sum(importance[e] * tensors(random_expert(e))[name].double() for e in (4, 1, 6)) / 0.7
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("importance", [1 / EXPERTS, 0.0])
@pytest.mark.parametrize("width", [WIDTH, 2 * WIDTH, 5])
def test_weighted_with_equal_importance_is_the_mean(importance: float, width: int) -> None:
    merged = merge("weighted", (4, 1, 6, 0), width=width, importance=(importance,) * EXPERTS)

    for name, tensor in tensors(merge("mean", (4, 1, 6, 0), width=width)).items():
        torch.testing.assert_close(tensors(merged)[name], tensor, rtol=1e-6, atol=1e-7)


def test_weighted_by_a_selection_without_importance_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"layer 0 of the selection has no importance.* take merge 'mean'"):
        strategy_of("weighted").function(
            layer_experts(), LayerSelection(layer=0, experts=(1,)), WIDTH, None, torch.Generator()
        )


@pytest.mark.parametrize("match", ["weights", "activations"])
@pytest.mark.parametrize("has_biases", [True, False])
def test_aligned_recovers_an_expert_from_its_permuted_copy_exactly_and_mean_does_not(
    match: str, has_biases: bool, tiled: bool, hidden_TD: torch.Tensor
) -> None:
    order = torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])

    def read(expert: int) -> ExpertWeights:
        original = random_expert(2, has_biases=has_biases)
        return original if expert == 2 else permuted(original, order)

    experts = layer_experts(read, tiled=tiled, inputs=True)
    original = read(2)
    assert torch.allclose(output_of(read(5), hidden_TD), output_of(original, hidden_TD), atol=1e-6)

    merged = merge("aligned", (2, 5), experts, match=match)

    for name, tensor in tensors(original).items():
        assert torch.equal(tensors(merged)[name], tensor)
    averaged = output_of(merge("mean", (2, 5), experts), hidden_TD)
    assert (averaged - output_of(original, hidden_TD)).norm() > 0.2 * output_of(original, hidden_TD).norm()


@pytest.mark.parametrize("match", ["weights", "activations"])
def test_aligned_finds_the_best_of_all_assignments(match: str) -> None:
    few = 5

    def read(expert: int) -> ExpertWeights:
        whole = random_expert(expert)
        return ExpertWeights(whole.gate[:few], whole.up[:few], whole.down[:, :few])

    experts = layer_experts(read, inputs=True)
    experts = LayerExperts(**(vars(experts) | {"width": few, "has_biases": False}))
    order = neuron_order(experts, 0, 1, match)  # type: ignore[arg-type]

    def vectors(expert: int) -> torch.Tensor:
        if match == "activations":
            return experts.neuron_activations(expert, experts.inputs_ND).T
        weights = read(expert)
        return torch.cat([weights.gate, weights.up, weights.down.T], dim=1)

    likeness = torch.cosine_similarity(vectors(0)[:, None], vectors(1)[None], dim=2)
    best = max(permutations(range(few)), key=lambda order: sum(float(likeness[i, j]) for i, j in enumerate(order)))
    assert order.tolist() == list(best)


def test_aligned_by_activations_without_kept_inputs_is_refused() -> None:
    with pytest.raises(UsageError, match="there are none; collect with keep_inputs above 0"):
        merge("aligned", (0, 1), layer_experts(), match="activations")


def test_neurons_takes_the_most_salient_of_the_layer_with_their_own_numbers(tiled: bool) -> None:
    merged = merge("neurons", (0,), layer_experts(saliency_EF=SALIENCY_EF, tiled=tiled), width=11)

    places = sorted(np.argsort(-SALIENCY_EF.ravel())[:11])
    for row, place in enumerate(places):
        expert, neuron = divmod(int(place), WIDTH)
        source = random_expert(expert)
        assert torch.equal(merged.gate[row], source.gate[neuron])
        assert torch.equal(merged.up[row], source.up[neuron])
        assert torch.equal(merged.down[:, row], source.down[:, neuron])
        assert merged.gate_bias[row] == source.gate_bias[neuron]
        assert merged.up_bias[row] == source.up_bias[neuron]
    shares = [random_expert(int(place) // WIDTH).down_bias / WIDTH for place in places]
    torch.testing.assert_close(merged.down_bias, torch.stack(shares).sum(dim=0))


@pytest.mark.parametrize("pool", ["layer", "selected"])
def test_neurons_at_full_width_of_a_single_expert_is_that_expert(pool: str, hidden_TD: torch.Tensor) -> None:
    saliency_EF = SALIENCY_EF.copy()
    saliency_EF[3] += 1 if pool == "layer" else 0

    merged = merge("neurons", (3,), layer_experts(saliency_EF=saliency_EF), pool=pool)

    for name, tensor in tensors(random_expert(3)).items():
        assert torch.equal(tensors(merged)[name], tensor)
    assert torch.equal(output_of(merged, hidden_TD), output_of(random_expert(3), hidden_TD))


def test_neurons_of_the_selected_experts_come_from_no_other() -> None:
    chosen = most_salient(SALIENCY_EF, [1, 4], 12)

    assert set(chosen) == {1, 4}
    flat = sorted(np.r_[SALIENCY_EF[1], SALIENCY_EF[4]], reverse=True)[:12]
    assert sorted((SALIENCY_EF[e, f] for e in chosen for f in chosen[e]), reverse=True) == flat


def test_equal_saliency_goes_by_expert_then_neuron() -> None:
    assert most_salient(np.ones((3, 4)), range(3), 6) == {0: [0, 1, 2, 3], 1: [0, 1]}


def test_contrast_prefers_what_general_text_does_not_use() -> None:
    learnt_EF, kept_EF = np.full((EXPERTS, WIDTH), 0.5), np.zeros((EXPERTS, WIDTH))
    learnt_EF[2], kept_EF[2] = 1.0, 0.8

    experts = layer_experts(saliency_EF=learnt_EF, kept_EF=kept_EF)

    assert torch.equal(merge("neurons", (0,), experts).gate, random_expert(2).gate)
    assert torch.equal(merge("neurons", (0,), experts, contrast=1.0).gate, random_expert(0).gate)
    with pytest.raises(UsageError, match=r"contrast is 1, but .* collect over one too, or write 0"):
        merge("neurons", (0,), layer_experts(saliency_EF=learnt_EF), contrast=1.0)


def test_neurons_without_saliency_is_refused() -> None:
    with pytest.raises(UsageError, match="needs neuron saliency, and there is none; collect with expert_norms"):
        merge("neurons", (0,), layer_experts())


def test_top1_is_the_first_expert_of_the_selection_unchanged(tiled: bool) -> None:
    merged = merge("top1", (5, 2), layer_experts(tiled=tiled))

    for name, tensor in tensors(random_expert(5)).items():
        assert torch.equal(tensors(merged)[name], tensor)


@pytest.mark.parametrize("width", [3, WIDTH, 2 * WIDTH + 3])
def test_random_neurons_have_the_norms_of_the_chosen_experts_and_nothing_else_of_them(width: int, tiled: bool) -> None:
    experts = layer_experts(tiled=tiled)
    merged = merge("random", (5, 2), experts, width=width)

    blocks = -(-width // WIDTH)
    sources = [random_expert((5, 2)[block % 2]) for block in range(blocks)]
    for rows in ("gate", "up"):
        expected = torch.cat([getattr(source, rows).norm(dim=1) for source in sources])[:width]
        torch.testing.assert_close(getattr(merged, rows).norm(dim=1), expected)
    expected = torch.cat([source.down.norm(dim=0) for source in sources])[:width] / blocks
    torch.testing.assert_close(merged.down.norm(dim=0), expected)
    assert torch.equal(merge("random", (5, 2), experts, width=width).gate, merged.gate)
    assert not torch.equal(merge("random", (5, 2), experts, width=width, seed=1).gate, merged.gate)


@pytest.mark.parametrize("name", ["mean", "weighted", "aligned", "top1"])
def test_with_a_block_for_every_expert_the_output_is_the_average_of_theirs(name: str, hidden_TD: torch.Tensor) -> None:
    chosen, importance = (4, 1, 6), (0.0, 0.1, 0.0, 0.0, 0.4, 0.3, 0.2, 0.0)

    merged = merge(name, chosen, width=3 * WIDTH, importance=importance)

    weights = {e: importance[e] if name == "weighted" else 1.0 for e in chosen}
    expected = sum(weights[e] * output_of(random_expert(e), hidden_TD) for e in chosen) / sum(weights.values())
    torch.testing.assert_close(output_of(merged, hidden_TD), expected, rtol=1e-5, atol=1e-5)


def test_wider_than_an_expert_the_chosen_are_dealt_out_by_rank(tiled: bool) -> None:
    merged = merge("mean", (4, 1, 6), layer_experts(tiled=tiled), width=2 * WIDTH)

    first = (random_expert(4).gate + random_expert(6).gate) / 2
    torch.testing.assert_close(merged.gate, torch.cat([first, random_expert(1).gate]))
    down = torch.cat([random_expert(4).down + random_expert(6).down, random_expert(1).down], dim=1) / 3
    torch.testing.assert_close(merged.down, down)
    bias = sum(random_expert(e).down_bias for e in (4, 1, 6)) / 3
    torch.testing.assert_close(merged.down_bias, bias)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("width", [1, 5, WIDTH + 3])
def test_a_width_between_keeps_the_neurons_that_do_most(width: int, inputs: bool, hidden_TD: torch.Tensor) -> None:
    experts = layer_experts(inputs=inputs)
    blocks = -(-width // WIDTH)

    merged = merge("mean", (4, 1, 6), experts, width=width)

    whole = merge("mean", (4, 1, 6), experts, width=blocks * WIDTH)
    if inputs:
        gate, up = (experts.inputs_ND @ w.T + b for w, b in ((whole.gate, whole.gate_bias), (whole.up, whole.up_bias)))
        size = activation(gate, up).abs().mean(dim=0)
    else:
        size = torch.cat([whole.gate, whole.up], dim=1).norm(dim=1)
    kept = torch.topk(size * whole.down.norm(dim=0), width).indices.sort().values
    expected = permuted(whole, kept)
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(merged)[name], tensor)


@pytest.mark.parametrize("width", [1, 5, WIDTH, 2 * WIDTH, 3 * WIDTH, 4 * WIDTH])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_biases", [True, False])
def test_every_strategy_gives_the_width_it_is_asked_for(name: str, width: int, has_biases: bool) -> None:
    def read(expert: int) -> ExpertWeights:
        return random_expert(expert, has_biases=has_biases)

    experts = layer_experts(read, saliency_EF=SALIENCY_EF, dtype=torch.bfloat16)

    merged = merge(name, (3, 1, 4, 2), experts, width=width)

    check_merged(merged, name, width, HIDDEN)
    assert set(tensors(merged)) == set(tensors(read(0)))
    for tensor in tensors(merged).values():
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()
        assert tensor.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_never_changes_the_experts_it_was_given(name: str) -> None:
    stored = {expert: random_expert(expert) for expert in range(EXPERTS)}

    apply_start(merge(name, (0, 1), layer_experts(stored.__getitem__, saliency_EF=SALIENCY_EF)), 0.0)

    for expert, weights in stored.items():
        for tensor_name, tensor in tensors(random_expert(expert)).items():
            assert torch.equal(tensors(weights)[tensor_name], tensor)
