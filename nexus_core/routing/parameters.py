"""What the parameters of a router's change are called, as routing strategies see them."""

from __future__ import annotations

# For `Strategy.needs`: the model gets a `nexus_core.additions.RouterDelta` per router before it trains.
ROUTER_DELTA = "router_delta"


# The bias that only decides which experts are chosen; the weights of the chosen ones do not feel it.
SELECTION_BIAS = "selection_bias"


def is_selection_bias(name: str) -> bool:
    """Whether a parameter of this name is a selection bias: rules move it, gradients do not."""
    return name.rpartition(".")[2] == SELECTION_BIAS


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    return name.rpartition(".")[2] == "bias"
