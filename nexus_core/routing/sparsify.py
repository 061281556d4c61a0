"""Routing that concentrates on the experts a domain uses most, so that the others fall silent.

The sign is the opposite of `balance`: what is chosen often is chosen more often. Source: ExpertCondenser,
arXiv 2604.23036.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexus_core.routing.balance import SelectionRate, overload
from nexus_core.routing.parameters import ROUTER_DELTA
from nexus_core.routing.plan import RouterPlan
from nexus_core.types import Strategy


def sparsify(names: Sequence[str], bias_lr_multiplier: float, parameters: SelectionRate | None = None) -> RouterPlan:
    """The selection bias rises by gamma where an expert got more than its even share of choices, and falls where less.

    Nothing of the router learns by gradient; the weights of chosen experts come from the logits alone.
    """
    gamma = (parameters or SelectionRate()).gamma
    return RouterPlan({}, lambda choices_E: gamma * overload(choices_E))


STRATEGY = Strategy(
    name="sparsify",
    function=sparsify,
    summary="A selection bias concentrates the load: up by gamma if overloaded, down if under (ExpertCondenser).",
    parameters=SelectionRate,
    needs=frozenset({ROUTER_DELTA}),
)
