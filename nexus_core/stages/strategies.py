"""From a strategy's name and parameters, as a recipe or flag gives them, to the strategy itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from nexus_core.errors import UsageError, suggestion
from nexus_core.plugins import installed
from nexus_core.types import Strategy


def choose_strategy(kind: str, name: str, parameters: Mapping[str, Any]) -> tuple[Strategy, BaseModel | None]:
    """A registered strategy and its checked parameters, defaults filled in; None if it has none.

    kind: "selection", "merge", "routing", "losses" or "data_formats". Raises UsageError if there is no strategy of
    that name, or a parameter is unknown or of the wrong type.
    """
    known = installed().strategies(kind)
    if name not in known:
        raise UsageError(f"there is no {kind} strategy '{name}'{suggestion(name, known)}")
    strategy = known[name]
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
