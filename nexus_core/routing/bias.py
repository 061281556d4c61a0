"""Routing whose biases learn: experts are preferred or avoided, but no token is read in a new way."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from nexus_core.routing.parameters import ROUTER_DELTA, is_bias
from nexus_core.types import Strategy


class BiasParameters(BaseModel):
    """Settings of `bias`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr_multiplier: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the biases, as a share of the shared experts'. `schedule.bias_lr_multiplier` is "
        "for biases that learn beside weights and does not slow these.",
    )


def bias(names: Sequence[str], bias_lr_multiplier: float, parameters: BiasParameters | None = None) -> dict[str, float]:
    """Only the router's biases train, at a rate of their own."""
    settings = parameters or BiasParameters()
    return {name: settings.lr_multiplier for name in names if is_bias(name)}


STRATEGY = Strategy(
    name="bias",
    function=bias,
    summary="Only a change of the router's biases learns beside the shared experts, until bias_freeze_ratio.",
    parameters=BiasParameters,
    needs=frozenset({ROUTER_DELTA}),
)
