"""Workloads of the shipped recipes, as estimates are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nexus_core.estimate import Prompts, Workload
from nexus_core.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def workload(
    recipe: str, *overrides: str, kind: str = "cuda", prompts: Mapping[str, Prompts] | None = None
) -> Workload:
    """What a recipe asks of a kind of device, with frozen routers and without statistics of neurons."""
    return Workload.of(
        load_recipe(RECIPES / recipe, overrides),
        kind,
        gathers_neurons=False,
        router_learns=False,
        capture_tokens=16_384,
        prompts=prompts,
    )
