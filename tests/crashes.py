"""Ends a piece of work at each of the places where it changes something on the disk, one after the other.

Python announces such changes to audit hooks just before they happen. `every_crash` runs the work in a forked child as
often as there are changes and ends the n-th child before the n-th change; what a test then finds in the folder is what
a SIGKILL there would have left.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR
CRASHED = 77

# killed: the process is gone. torn: so is the machine, and of files that nobody had brought to the disk half is left.
# failed: the change is refused, as a full disk would, and the process goes on with the error.
Kind = Literal["killed", "torn", "failed"]


class Refused(OSError):
    """What a change raises that is refused."""


def every_crash(
    root: Path, work: Callable[[Path], Any], kind: Kind = "killed", prepare: Callable[[Path], Any] = lambda folder: None
) -> Iterator[Path]:
    """Yield a folder for each change that `work` makes in it, as the crash before that change left it.

    prepare: fills a folder before. Fails if the work makes no change, or fails by itself.
    """
    for number in count(1):
        folder = root / f"{kind}-{number:03d}"
        folder.mkdir(parents=True)
        prepare(folder)
        if not _crashes(folder, work, number, kind):
            assert number > 1, "the work changed nothing"
            return
        yield folder


def _crashes(folder: Path, work: Callable[[Path], Any], number: int, kind: Kind) -> bool:
    """Run the work in a child that does not get beyond the change of this number; False if there is none."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        crash = _Crash(folder, number, kind)
        sys.addaudithook(crash)
        code = 0
        try:
            work(folder)
        except BaseException:
            # What follows from a refused change is another error, or the same.
            if not crash.happened:
                traceback.print_exc()
                code = 1
        finally:
            os._exit(CRASHED if crash.happened else code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, CRASHED), f"the work failed by itself before change {number}"
    return code == CRASHED


class _Crash:
    """An audit hook that counts changes inside a folder, and ends the process before one of them."""

    def __init__(self, folder: Path, number: int, kind: Kind):
        self.folder, self.left, self.kind = str(folder), number, kind
        self.happened = False
        # When each file was last changed, by its number, of those whose content is on the disk.
        self._synced = {about.st_ino: about.st_mtime_ns for about in (path.stat() for path in folder.rglob("*"))}
        fsync = os.fsync

        def remembered(descriptor: int) -> None:
            fsync(descriptor)
            self._synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_mtime_ns

        os.fsync = remembered

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.happened or not self._is_change(event, arguments):
            return
        self.left -= 1
        if self.left:
            return
        self.happened = True
        if self.kind == "failed":
            raise Refused(f"{event} {arguments[:2]}")
        if self.kind == "torn":
            self._tear()
        os._exit(CRASHED)

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return False
            return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder)
        if event not in CHANGES:
            return False
        # Inside a folder that is removed whole, names are relative to descriptors.
        path = arguments[0]
        is_inside = isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder)
        return is_inside or (event in ("os.remove", "os.rmdir") and not Path(os.fsdecode(path)).is_absolute())

    def _tear(self) -> None:
        for path in Path(self.folder).rglob("*"):
            if path.is_symlink() or not path.is_file():
                continue
            about = path.stat()
            is_linked = about.st_nlink > 1  # it was on the disk before, under its other name
            if not is_linked and self._synced.get(about.st_ino) != about.st_mtime_ns:
                os.truncate(path, about.st_size // 2)
