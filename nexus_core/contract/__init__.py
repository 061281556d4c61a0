"""What every family promises, as checks that run on any of its base checkpoints; small ones take seconds.

A check takes a Subject, raises BrokenContract with what was promised and what was found, and returns nothing. CHECKS
holds all of them by name. A checkpoint that fits in memory twice is enough; random numbers will do.
"""

from collections.abc import Callable, Mapping

from nexus_core.contract.additions import check_teacher, check_training, check_zero_additions
from nexus_core.contract.conversion import (
    check_conversion,
    check_fresh_process,
    check_fresh_processes,
    check_full_start,
    check_round_trip,
)
from nexus_core.contract.disk import check_claims, check_locations, check_refusals, check_stored_bytes
from nexus_core.contract.function import check_experts, check_routers
from nexus_core.contract.subject import BrokenContract, Subject, disturb

CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "claims": check_claims,
    "locations": check_locations,
    "stored_bytes": check_stored_bytes,
    "experts": check_experts,
    "routers": check_routers,
    "zero_additions": check_zero_additions,
    "teacher": check_teacher,
    "conversion": check_conversion,
    "full_start": check_full_start,
    "round_trip": check_round_trip,
    "fresh_process": check_fresh_process,
    "training": check_training,
    "refusals": check_refusals,
}

__all__ = ["CHECKS", "BrokenContract", "Subject", "check_fresh_processes", "disturb"]
