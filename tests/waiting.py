"""Waits for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_SECONDS = 0.01


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return when the condition holds; an AssertionError if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(POLL_SECONDS)
