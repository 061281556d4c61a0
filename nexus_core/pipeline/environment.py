"""What a run was executed with: recorded with it, never part of a key."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nexus_core import __version__
from nexus_core.processes import world
from nexus_core.recipe.schema import Recipe

# The libraries whose arithmetic ends up in the outputs.
RECORDED = ("torch", "transformers")

# A repository on a file system that hangs must not hold up a run.
GIT_SECONDS = 5.0


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
    """Everything about this execution that observers may want to record: the recipe's `run`, device, versions, and the
    state of the repository that the recipe lies in.
    """
    # A launcher's number of processes goes before the recipe's.
    processes = world().size
    return {
        **recipe.run.model_dump(mode="json"),
        "processes": processes,
        "device": device,
        "versions": versions(),
        "git": git_state(recipe.folder),
    }


def git_state(folder: Path) -> dict[str, Any]:
    """The commit of the repository that a folder lies in, and whether tracked files differ from it; empty without a
    repository, a commit, or git.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "has_changes": bool(changes.strip())}


def _git(folder: Path, *words: str) -> str:
    # Without optional locks, or looking would write into the repository.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
    )
    return done.stdout
