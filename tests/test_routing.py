"""Routing strategies: which of the router's parameters train, and how fast."""

from __future__ import annotations

from nexus_core.routing import ROUTER_DELTA, STRATEGIES

NAMES = ["layers.0.router_delta.weight", "layers.0.router_delta.bias", "layers.1.router_delta.weight"]
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


def test_frozen_trains_nothing_of_the_router_and_needs_no_change_of_it() -> None:
    assert BY_NAME["frozen"].function(NAMES, 0.001, None) == {}
    assert ROUTER_DELTA not in BY_NAME["frozen"].needs


def test_trainable_trains_all_and_slows_biases_down() -> None:
    assert BY_NAME["trainable"].function(NAMES, 0.001, None) == dict(zip(NAMES, (1.0, 0.001, 1.0), strict=True))
    assert ROUTER_DELTA in BY_NAME["trainable"].needs


def test_bias_trains_biases_only() -> None:
    assert BY_NAME["bias"].function(NAMES, 0.5, None) == {NAMES[1]: 0.5}
    assert ROUTER_DELTA in BY_NAME["bias"].needs
