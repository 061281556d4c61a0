"""Routing strategies: which of the router's parameters train, how fast, and which way rules move the selection bias."""

from __future__ import annotations

import pytest
import torch

from nexus_core.routing import ROUTER_DELTA, STRATEGIES, RouterPlan
from nexus_core.routing.balance import SelectionRate
from nexus_core.routing.bias import BiasParameters

NAMES = ["layers.0.router_delta.weight", "layers.0.router_delta.bias", "layers.1.router_delta.weight"]
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}

# Of one layer's experts: chosen often, at the mean, rarely, never.
CHOICES = torch.tensor([7, 3, 2, 0])


def test_frozen_trains_nothing_of_the_router_and_needs_no_change_of_it() -> None:
    assert BY_NAME["frozen"].function(NAMES, 0.001, None) == {}
    assert ROUTER_DELTA not in BY_NAME["frozen"].needs


def test_trainable_trains_all_and_slows_biases_down() -> None:
    assert BY_NAME["trainable"].function(NAMES, 0.001, None) == dict(zip(NAMES, (1.0, 0.001, 1.0), strict=True))
    assert ROUTER_DELTA in BY_NAME["trainable"].needs


def test_bias_trains_biases_only_and_at_a_rate_of_its_own() -> None:
    assert BY_NAME["bias"].function(NAMES, 0.001, None) == {NAMES[1]: 1.0}
    assert BY_NAME["bias"].function(NAMES, 0.001, BiasParameters(lr_multiplier=0.2)) == {NAMES[1]: 0.2}
    assert ROUTER_DELTA in BY_NAME["bias"].needs


def test_balance_lowers_the_overloaded_and_raises_the_others_as_deepseek_v3_does() -> None:
    plan = BY_NAME["balance"].function(NAMES, 0.001, SelectionRate(gamma=0.5))
    assert plan.lr_multipliers == {}
    assert plan.selection_step(CHOICES).tolist() == [-0.5, 0.0, 0.5, 0.5]


def test_sparsify_has_the_opposite_sign() -> None:
    plan = BY_NAME["sparsify"].function(NAMES, 0.001, SelectionRate(gamma=0.5))
    assert plan.selection_step(CHOICES).tolist() == [0.5, 0.0, -0.5, -0.5]


@pytest.mark.parametrize("name", ["balance", "sparsify"])
def test_rules_move_by_a_thousandth_unless_told_otherwise_and_need_a_change_of_the_router(name: str) -> None:
    plan = BY_NAME[name].function(NAMES, 0.001, None)
    assert plan.selection_step(CHOICES).abs().max() == pytest.approx(1e-3)
    assert ROUTER_DELTA in BY_NAME[name].needs


def test_a_plain_mapping_is_a_plan_without_a_rule() -> None:
    assert RouterPlan.of({NAMES[0]: 1.0}) == RouterPlan({NAMES[0]: 1.0}, None)
