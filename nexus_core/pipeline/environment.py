"""What a run was executed with: recorded with it, never part of a key."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nexus_core import __version__
from nexus_core.processes import world
from nexus_core.recipe.schema import Recipe

# The libraries whose arithmetic ends up in the outputs.
RECORDED = ("torch", "transformers")


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of NEXUS, Python and the libraries that compute."""
    found = {"nexus": __version__, "python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def execution(recipe: Recipe, device: str) -> dict[str, Any]:
    """Everything about this execution that observers may want to record: the recipe's `run`, device, versions."""
    # A launcher's number of processes goes before the recipe's.
    processes = world().size
    return {**recipe.run.model_dump(mode="json"), "processes": processes, "device": device, "versions": versions()}
