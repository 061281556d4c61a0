"""Routing whose biases learn: experts are preferred or avoided, but no token is read in a new way."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_core.routing.parameters import ROUTER_DELTA, is_bias
from nexus_core.types import Strategy


def bias(names: Sequence[str], bias_lr_multiplier: float, parameters: None = None) -> dict[str, float]:
    """Only the router's biases train, at the schedule's rate for them."""
    return {name: bias_lr_multiplier for name in names if is_bias(name)}


STRATEGY = Strategy(
    name="bias",
    function=bias,
    summary="Only a change of the router's biases learns beside the shared experts, until bias_freeze_ratio.",
    needs=frozenset({ROUTER_DELTA}),
)
