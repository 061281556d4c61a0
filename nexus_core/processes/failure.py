"""What one of several processes says when it fails, and what the others learn of it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from threading import Thread
from typing import Any

from nexus_core.errors import NexusError
from nexus_core.processes.world import LISTENING, is_joined, world, world_if_any

# How long one that lost contact looks for the reason of it, and how long one that failed stays to give it.
REASON_SECONDS = 2.0

FAILURE_KEY, HEARD_KEY = "nexus/failure", "nexus/heard"

# Exit codes: of a process that another one left alone, and of one that was interrupted.
LOST_CONTACT, INTERRUPTED = 75, 130


class OtherProcessFailed(NexusError):
    """Another process had to stop, so this one stops too. The other one says why, this one is silent.

    exit_code: as of the process that failed; LOST_CONTACT if that is not known.
    """

    def __init__(self, sentence: str, exit_code: int = LOST_CONTACT):
        super().__init__(sentence)
        self.exit_code = exit_code


def first_to_fail(error: BaseException, sentence: str, exit_code: int) -> bool:
    """Tell the other processes why this one stops; whether it is the one that should say so aloud.

    Called once, at the end of a process that failed: it does not meet the others again.
    """
    here = world_if_any()
    if here.alone:
        return True
    # Which process ended without a word is known to the launcher; torchrun shows it, with much else.
    is_silent = isinstance(error, OtherProcessFailed) and (exit_code != LOST_CONTACT or LISTENING in os.environ)
    # Every process is interrupted, and the first one knows in which stage.
    is_silent |= exit_code == INTERRUPTED and not here.is_first
    if not is_joined():
        return not is_silent
    store = _default_store()
    try:
        claim = json.dumps({"rank": here.rank, "sentence": sentence, "exit_code": exit_code})
        is_ours = not is_silent and store.compare_set(FAILURE_KEY, "", claim).decode() == claim
        if not here.is_first:
            store.add(HEARD_KEY, 1)
        # Whoever waits for this process learns at once that it is gone, and looks for the reason in the store, which
        # ends with the first process. Closing can itself wait for one that is gone.
        closing = Thread(target=_close, daemon=True)
        closing.start()
        closing.join(REASON_SECONDS)
        if here.is_first:
            _wait_until_heard(store, here.size - 1)
    except (RuntimeError, ValueError):
        return not is_silent
    return is_ours


def _close() -> None:
    from torch import distributed

    with suppress(RuntimeError, ValueError):
        distributed.destroy_process_group()


def _wait_until_heard(store: Any, others: int) -> None:
    until = time.monotonic() + REASON_SECONDS
    while time.monotonic() < until and store.add(HEARD_KEY, 0) < others:
        time.sleep(0.05)


def lost_contact(error: BaseException) -> OtherProcessFailed | None:
    """What an error means if it is a library's that could not reach another process; None if it is another error."""
    if world().alone or not isinstance(error, RuntimeError) or not is_joined():
        return None
    from torch import distributed

    if not (isinstance(error, distributed.DistError) or "gloo/transport" in str(error)):
        return None
    reason = _reason()
    if reason is None:
        return OtherProcessFailed(f"lost contact with another process ({first_words(error)})")
    return OtherProcessFailed(reason["sentence"], reason["exit_code"])


def _reason() -> dict[str, Any] | None:
    """Why another process stopped, as it said; None if it did not."""
    until = time.monotonic() + REASON_SECONDS
    with suppress(RuntimeError, ValueError):
        store = _default_store()
        while time.monotonic() < until:
            if store.check([FAILURE_KEY]):
                found: dict[str, Any] = json.loads(store.get(FAILURE_KEY))
                return found
            time.sleep(0.05)
    return None


def _default_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def first_words(error: BaseException) -> str:
    """The first sentence of an error, and no more."""
    # Gloo appends advice and good wishes.
    return str(error).strip().partition("\n")[0].partition(". ")[0]
