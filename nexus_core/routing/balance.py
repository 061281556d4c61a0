"""Routing that evens out how often experts are chosen, without a loss for it.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2. The opposite rule is `sparsify`.

    # E experts
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.routing.parameters import ROUTER_DELTA
from nexus_core.routing.plan import RouterPlan
from nexus_core.types import Strategy


class SelectionRate(BaseModel):
    """Settings of `balance` and `sparsify`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gamma: float = Field(1.0e-3, gt=0, description="How far a selection bias moves in one step.")


def balance(names: Sequence[str], bias_lr_multiplier: float, parameters: SelectionRate | None = None) -> RouterPlan:
    """The selection bias falls by gamma where an expert got more than its even share of choices, and rises where less.

    Nothing of the router learns by gradient; the weights of chosen experts come from the logits alone.
    """
    gamma = (parameters or SelectionRate()).gamma
    return RouterPlan({}, lambda choices_E: -gamma * overload(choices_E))


def overload(choices_E: torch.Tensor) -> torch.Tensor:
    """1 for experts chosen more often than the mean, -1 for those chosen less often, 0 for those at it; float32."""
    choices_E = choices_E.double()
    return (choices_E - choices_E.mean()).sign().float()


STRATEGY = Strategy(
    name="balance",
    function=balance,
    summary="A selection bias evens out the experts' load: down by gamma if overloaded, up if under (DeepSeek-V3).",
    parameters=SelectionRate,
    needs=frozenset({ROUTER_DELTA}),
)
