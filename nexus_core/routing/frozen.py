"""Routing as the base's: nothing of the router learns."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_core.types import Strategy


def frozen(names: Sequence[str], bias_lr_multiplier: float, parameters: None = None) -> dict[str, float]:
    """No router parameter trains."""
    return {}


STRATEGY = Strategy(name="frozen", function=frozen, summary="The router stays as it is; only shared experts learn.")
