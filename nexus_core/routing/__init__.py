"""What of the router learns, one strategy per file, `train.routing.strategy` in recipes.

A strategy is a pure function `(names, bias_lr_multiplier, parameters) -> {name: learning rate multiplier}`, or a
`RouterPlan` where a rule moves the selection bias. names: of the parameters of all `nexus_core.additions.RouterDelta`
modules that can learn by gradient; those it leaves out do not. Its `needs` holds "router_delta" if routers must have
such a change.
"""

from nexus_core.routing import balance, bias, frozen, sparsify, trainable
from nexus_core.routing.parameters import ROUTER_DELTA
from nexus_core.routing.plan import RouterPlan

STRATEGIES = [frozen.STRATEGY, trainable.STRATEGY, bias.STRATEGY, balance.STRATEGY, sparsify.STRATEGY]

__all__ = ["ROUTER_DELTA", "STRATEGIES", "RouterPlan"]
