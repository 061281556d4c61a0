"""Routing that learns: weights and biases of the router's change."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_core.routing.parameters import ROUTER_DELTA, is_bias
from nexus_core.types import Strategy


def trainable(names: Sequence[str], bias_lr_multiplier: float, parameters: None = None) -> dict[str, float]:
    """All router parameters train; biases, which move every token's choice at once, at their own, lower rate."""
    return {name: bias_lr_multiplier if is_bias(name) else 1.0 for name in names}


STRATEGY = Strategy(
    name="trainable",
    function=trainable,
    summary="A change of the router's weights and biases learns too, until bias_freeze_ratio of the steps.",
    needs=frozenset({ROUTER_DELTA}),
)
