"""What the parameters of a router's change are called, as routing strategies see them."""

from __future__ import annotations

# For `Strategy.needs`: the model gets a `nexus_core.additions.RouterDelta` per router before it trains.
ROUTER_DELTA = "router_delta"


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    return name.rpartition(".")[2] == "bias"
