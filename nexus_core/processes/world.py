"""This process's place among several."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from nexus_core.errors import UsageError

# Set by the launcher of `nexus_core.cli.launch`: a socket that already listens, so that nobody else can take the port.
LISTENING = "NEXUS_LISTENING_DESCRIPTOR"


@dataclass(frozen=True)
class World:
    """This process among those that work together. local_rank: its number on this machine, and that of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes, prints and tells observers."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1


def world() -> World:
    """This process's place, from the environment that a launcher sets. Raises UsageError if that makes no sense."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World()
    given = {name: os.environ.get(name, "") for name in names}
    found = World(*(int(text) if text.isdecimal() else -1 for text in given.values()))
    if not 0 <= found.rank < found.size or found.local_rank < 0:
        said = ", ".join(f"{name}={text!r}" for name, text in given.items())
        raise UsageError(f"the environment says {said}, which is no place among processes; start them with torchrun")
    return found


def world_if_any() -> World:
    """As `world`, for those who report errors: where the environment makes no sense, a process that is alone."""
    try:
        return world()
    except UsageError:
        return World()


def is_joined() -> bool:
    """Whether this process has met the others."""
    # What was never imported was never initialized; importing torch to ask would cost two seconds.
    if "torch.distributed" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()
