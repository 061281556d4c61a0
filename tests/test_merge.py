"""Merge strategies and starts: pure functions of experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nexus_core.errors import ShapeError, UsageError
from nexus_core.merge import STRATEGIES, apply_start, expert_output, measure_effect, start_factor
from nexus_core.merge.weights import tensors
from nexus_core.select import LayerSelection
from nexus_core.types import ExpertWeights

HIDDEN, WIDTH = 12, 8


def random_expert(index: int, *, dtype: torch.dtype = torch.bfloat16, has_biases: bool = True) -> ExpertWeights:
    generator = torch.Generator().manual_seed(index)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = ExpertWeights(normal(WIDTH, HIDDEN), normal(WIDTH, HIDDEN), normal(HIDDEN, WIDTH))
    if has_biases:
        weights.gate_bias, weights.up_bias, weights.down_bias = normal(WIDTH), normal(WIDTH), normal(HIDDEN)
    return weights


def merge(
    name: str, experts: tuple[int, ...], read: Callable[[int], ExpertWeights] = random_expert, width: int = WIDTH
) -> ExpertWeights:
    strategy = next(strategy for strategy in STRATEGIES if strategy.name == name)
    return strategy.function(read, LayerSelection(layer=0, experts=experts), width, None, torch.Generator())


@pytest.mark.parametrize("has_biases", [True, False])
def test_mean_is_the_average_of_every_number_in_float32(has_biases: bool) -> None:
    merged = merge("mean", (4, 1, 6), lambda expert: random_expert(expert, has_biases=has_biases))

    experts = [tensors(random_expert(expert, has_biases=has_biases)) for expert in (4, 1, 6)]
    assert set(tensors(merged)) == set(experts[0])
    for name, tensor in tensors(merged).items():
        expected = torch.stack([expert[name].double() for expert in experts]).mean(dim=0)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_mean_reads_each_chosen_expert_once_and_no_other() -> None:
    asked: list[int] = []

    def read(expert: int) -> ExpertWeights:
        asked.append(expert)
        return random_expert(expert)

    merge("mean", (4, 1, 6), read)

    assert asked == [4, 1, 6]


def test_top1_is_the_first_expert_of_the_selection_unchanged() -> None:
    merged = merge("top1", (5, 2))

    for name, tensor in tensors(random_expert(5)).items():
        assert torch.equal(tensors(merged)[name], tensor.float())


@pytest.mark.parametrize("name", ["mean", "top1"])
def test_a_merge_never_changes_the_experts_it_was_given(name: str) -> None:
    stored = {expert: random_expert(expert, dtype=torch.float32) for expert in (0, 1)}

    merge(name, (0, 1), stored.__getitem__)

    assert torch.equal(stored[0].gate, random_expert(0, dtype=torch.float32).gate)


@pytest.mark.parametrize("name", ["mean", "top1"])
def test_another_width_than_the_experts_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"width is 5, but merge '{name}' .* {WIDTH} neurons; leave width out"):
        merge(name, (0, 1), width=5)


def test_zero_start_keeps_the_features_and_puts_out_exactly_nothing() -> None:
    merged = merge("mean", (0, 1))
    gate = merged.gate.clone()

    started = apply_start(merged, start_factor("zero"))

    assert torch.equal(started.gate, gate)
    for tensor in (started.down, started.down_bias):
        assert torch.count_nonzero(tensor) == 0
        assert not torch.signbit(tensor).any()


def test_a_factor_scales_the_output_and_full_leaves_it() -> None:
    hidden_TD = torch.randn(5, HIDDEN)
    full = expert_output(apply_start(merge("mean", (0, 1)), start_factor("full")), hidden_TD, torch.mul)
    half = expert_output(apply_start(merge("mean", (0, 1)), start_factor(0.5)), hidden_TD, torch.mul)

    torch.testing.assert_close(half, full / 2)
    torch.testing.assert_close(full, expert_output(merge("mean", (0, 1)), hidden_TD, torch.mul))


@pytest.mark.parametrize("start", [float("nan"), float("inf")])
def test_a_start_that_is_not_finite_is_refused(start: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        start_factor(start)


def test_expert_output_is_the_documented_formula() -> None:
    weights, hidden_TD = random_expert(3, dtype=torch.float32), torch.randn(4, HIDDEN)
    assert weights.gate_bias is not None
    assert weights.up_bias is not None

    expected = [
        weights.down @ ((weights.gate @ x + weights.gate_bias).sin() * (weights.up @ x + weights.up_bias))
        + weights.down_bias
        for x in hidden_TD
    ]

    output_TD = expert_output(weights, hidden_TD, lambda gate, up: gate.sin() * up)
    torch.testing.assert_close(output_TD, torch.stack(expected))


def test_effect_is_the_ratio_of_norms_and_the_mean_cosine() -> None:
    routed_TD = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    shared_TD = torch.tensor([[3.0, 4.0], [12.0, 0.0]])

    effect = measure_effect(shared_TD, routed_TD)

    assert effect.relative_change == pytest.approx(1.0)
    assert effect.cosine == pytest.approx(0.5)


def test_effect_of_outputs_of_different_inputs_is_refused() -> None:
    with pytest.raises(ShapeError, match="not of the same inputs"):
        measure_effect(torch.ones(2, 3), torch.ones(3, 3))
