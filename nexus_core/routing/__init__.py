"""What of the router learns, one strategy per file, `train.routing.strategy` in recipes.

A strategy is a pure function `(names, bias_lr_multiplier, parameters) -> {name: learning rate multiplier}`. names: of
the parameters of all `nexus_core.additions.RouterDelta` modules; those it leaves out do not train. Its `needs` holds
"router_delta" if routers must have such a change.
"""

from nexus_core.routing import bias, frozen, trainable
from nexus_core.routing.parameters import ROUTER_DELTA

STRATEGIES = [frozen.STRATEGY, trainable.STRATEGY, bias.STRATEGY]

__all__ = ["ROUTER_DELTA", "STRATEGIES"]
