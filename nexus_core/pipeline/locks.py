"""One writer at a time for one output: a file lock that a dead process does not hold."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.2
REMIND_SECONDS = 60.0

_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker that outlives a killed run would otherwise keep its lock: flock belongs to the open file, which
    # both share. Closing the child's copy does not release the parent's.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def exclusive(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`; wait, and `tell` who holds it, while another process does.

    The kernel drops the lock with its owner, so there are no stale locks to break.
    """
    descriptor = _take(path, tell)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(descriptor, json.dumps(owner).encode())
        yield
    finally:
        # Unlinked while it is held: whoever opened it before sees that it is gone and opens the next one.
        path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _take(path: Path, tell: Callable[[str], None]) -> int:
    told_at = float("-inf")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_there(path, descriptor):
                return descriptor
            os.close(descriptor)
            continue
        except BlockingIOError:
            if time.monotonic() - told_at >= REMIND_SECONDS:
                told_at = time.monotonic()
                tell(owner_of(path))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(POLL_SECONDS)


def owner_of(path: Path) -> str:
    """`process 123 on HOST since TIME`, as the owner wrote it into the lock file."""
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))  # noqa: PTH116 - the same call for both sides
    except FileNotFoundError:
        return False
