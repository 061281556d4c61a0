"""Several processes that do one piece of work together: every one of them runs the same code, each on its own part.

A launcher (`nexus run --processes N`, or torchrun) tells each process its rank in the environment. Small JSON values
and sums of tensors are exchanged; nothing is unpickled. Alone, every function does nothing and returns at once. torch
is imported only where there are several processes.
"""

from nexus_core.processes.exchange import barrier, broadcast, gather, join, leave, sum_in_place, together
from nexus_core.processes.failure import INTERRUPTED, LOST_CONTACT, OtherProcessFailed, first_to_fail, lost_contact
from nexus_core.processes.world import LISTENING, World, world, world_if_any

__all__ = [
    "INTERRUPTED",
    "LISTENING",
    "LOST_CONTACT",
    "OtherProcessFailed",
    "World",
    "barrier",
    "broadcast",
    "first_to_fail",
    "gather",
    "join",
    "leave",
    "lost_contact",
    "sum_in_place",
    "together",
    "world",
    "world_if_any",
]
