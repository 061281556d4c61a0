"""Warnings while a run trains: what is out of bounds, what that means, and what to do; each is said once.

Healthy on a model of 117B parameters: loss about 1.5, router KL 0.06 to 0.08, gradient norm below 1, router L1 0.2-0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A value of metrics.jsonl that should stay at or below `limit`, and the advice if it does not."""

    metric: str
    limit: float
    title: str
    advice: str


BOUNDS = (
    Bound(
        "router_kl",
        0.15,
        "router KL",
        "routing is drifting from the base; raise train.losses.router_kl, lower train.learning_rate, "
        "or, if the router trains, set train.routing.strategy to frozen",
    ),
    Bound(
        "gradient_norm",
        5.0,
        "gradient norm",
        "steps are clipped hard; lower train.learning_rate or raise train.schedule.warmup_ratio or "
        "train.gradient_accumulation",
    ),
    Bound(
        "router_l1",
        0.5,
        "router L1 distance to the base",
        "a quarter of the routing probability sits on other experts; raise train.losses.router_kl, lower "
        "train.learning_rate, or, if the router trains, freeze it earlier (train.schedule.bias_freeze_ratio)",
    ),
)


class Health:
    """Watches the rows of a run. say: called with each warning, one sentence."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._said: set[str] = set()

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Warn of what is out of bounds for the first time."""
        for bound in BOUNDS:
            value = values.get(bound.metric)
            if value is not None and value > bound.limit and bound.metric not in self._said:
                self._said.add(bound.metric)
                self._say(f"step {step}: {bound.title} {value:.3g} is above {bound.limit:g}: {bound.advice}")
