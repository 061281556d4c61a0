"""Starts, and what a merged expert does to the output of its layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_experts import HIDDEN, merge, output_of, random_expert

from nexus_core.errors import ShapeError, UsageError
from nexus_core.merge import apply_start, expert_output, measure_effect, start_factor


@pytest.fixture
def hidden_TD() -> torch.Tensor:
    return torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3))


def test_zero_start_keeps_the_features_and_puts_out_exactly_nothing() -> None:
    merged = merge("mean", (0, 1))
    gate = merged.gate.clone()

    started = apply_start(merged, start_factor("zero"))

    assert torch.equal(started.gate, gate)
    for tensor in (started.down, started.down_bias):
        assert torch.count_nonzero(tensor) == 0
        assert not torch.signbit(tensor).any()


def test_a_factor_scales_the_output_and_full_leaves_it(hidden_TD: torch.Tensor) -> None:
    full = output_of(apply_start(merge("mean", (0, 1)), start_factor("full")), hidden_TD)
    half = output_of(apply_start(merge("mean", (0, 1)), start_factor(0.5)), hidden_TD)

    torch.testing.assert_close(half, full / 2)
    torch.testing.assert_close(full, output_of(merge("mean", (0, 1)), hidden_TD))


@pytest.mark.parametrize("start", [float("nan"), float("inf")])
def test_a_start_that_is_not_finite_is_refused(start: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        start_factor(start)


@pytest.mark.parametrize("tile", [3, 512])
def test_expert_output_is_the_documented_formula(
    monkeypatch: pytest.MonkeyPatch, hidden_TD: torch.Tensor, tile: int
) -> None:
    monkeypatch.setattr("nexus_core.merge.effect.TILE_NEURONS", tile)
    weights = random_expert(3)
    formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda gate, up: gate.sin() * up  # noqa: E731

    expected = [
        weights.down @ formula(weights.gate @ x + weights.gate_bias, weights.up @ x + weights.up_bias)
        + weights.down_bias
        for x in hidden_TD
    ]

    torch.testing.assert_close(expert_output(weights, hidden_TD, formula), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_effect_is_the_ratio_of_norms_and_the_mean_cosine() -> None:
    routed_TD = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    shared_TD = torch.tensor([[3.0, 4.0], [12.0, 0.0]])

    effect = measure_effect(shared_TD, routed_TD)

    assert effect.relative_change == pytest.approx(1.0)
    assert effect.cosine == pytest.approx(0.5)


def test_effect_of_outputs_of_different_inputs_is_refused() -> None:
    with pytest.raises(ShapeError, match="not of the same inputs"):
        measure_effect(torch.ones(2, 3), torch.ones(3, 3))
