"""How much of its merged expert a shared expert puts out before it has learnt anything."""

from __future__ import annotations

import math
from typing import Literal

from nexus_core.errors import UsageError
from nexus_core.types import ExpertWeights


def start_factor(start: Literal["zero", "full"] | float) -> float:
    """The number a start stands for: "zero" is 0, "full" is 1. Raises UsageError if it is not finite."""
    factor = {"zero": 0.0, "full": 1.0}.get(start) if isinstance(start, str) else float(start)
    if factor is None or not math.isfinite(factor):
        raise UsageError(f"start is {start}; give zero, full or a finite number")
    return factor


def apply_start(weights: ExpertWeights, factor: float) -> ExpertWeights:
    """Scale an expert's output in place: down and its bias times `factor`, gate and up as they are.

    At 0 the features of the merged expert are kept and its output is exactly zero, so adding it changes nothing.
    """
    for tensor in (weights.down, weights.down_bias):
        if tensor is None:
            continue
        if factor == 0:
            # Not by multiplication, which would leave negative zeros.
            tensor.zero_()
        else:
            tensor.mul_(factor)
    return weights
