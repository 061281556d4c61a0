"""From a strategy's name and parameters, as a recipe or flag gives them, to the strategy itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from nexus_core.distill.signals import SIGNALS
from nexus_core.errors import PluginError, UsageError, suggestion
from nexus_core.plugins import installed
from nexus_core.routing import ROUTER_DELTA
from nexus_core.statistics.saliency import NEED as NEURON_SALIENCY
from nexus_core.types import Strategy

EXPERT_NORMS = "expert_norms"

# All that a strategy's `needs` may name. A misspelt one would be gathered by nobody, and missed only when the strategy
# is called, after everything before it is done.
NEEDS = {
    "selection": frozenset({"mean", "covariance", "topk_count", "gate_mass", EXPERT_NORMS}),
    "merge": frozenset({EXPERT_NORMS, NEURON_SALIENCY}),
    "routing": frozenset({ROUTER_DELTA}),
    "losses": SIGNALS,
    "data_formats": frozenset[str](),
}


def choose_strategy(kind: str, name: str, parameters: Mapping[str, Any]) -> tuple[Strategy, BaseModel | None]:
    """A registered strategy and its checked parameters, defaults filled in; None if it has none.

    kind: "selection", "merge", "routing", "losses" or "data_formats". Raises UsageError if there is no strategy of
    that name, or a parameter is unknown or of the wrong type; PluginError if it needs what nobody gathers.
    """
    known = installed().strategies(kind)
    if name not in known:
        raise UsageError(f"there is no {kind} strategy '{name}'{suggestion(name, known)}")
    strategy = known[name]
    for need in sorted(strategy.needs - NEEDS[kind]):
        raise PluginError(
            f"{kind} strategy '{name}' says that it needs '{need}', which NEXUS does not know"
            f"{suggestion(need, NEEDS[kind])}"
        )
    if strategy.parameters is None:
        if parameters:
            raise UsageError(f"{kind} strategy '{name}' has no parameters, so '{next(iter(parameters))}' is unknown")
        return strategy, None
    try:
        return strategy, strategy.parameters.model_validate(dict(parameters))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"{kind} strategy '{name}' has no parameter '{key}'{suggestion(key, strategy.parameters.model_fields)}"
            ) from error
        raise UsageError(f"{kind} strategy '{name}': {key} is {first['input']!r}: {first['msg'].lower()}") from error
