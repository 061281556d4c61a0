"""Writing that ends well: folders that appear when they are whole, and sentences where a disk says no."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_core.checkpoint.writer import sync_folder
from nexus_core.errors import NexusError, StageError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Where a file has the name of a folder on the way, making that folder ends with EEXIST.
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes its place when the block ends well and vanishes when it does not.

    Raises UsageError if `out` is a file, a folder with something in it, or somewhere that cannot be written.
    """
    out = Path(out).expanduser()
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out}: the folder is not empty; name another, or delete it first")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder that does not exist yet")
    advice = "free some space, or give --out on another disk"
    with storage_errors(out.parent, advice):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        # mkdtemp makes it private; the result is as readable as any other folder.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
    try:
        with storage_errors(out.parent, advice):
            yield folder
            sync_folder(folder)
            folder.rename(out)
            sync_folder(out.parent, recursive=False)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def storage_errors(folder: Path, advice: str) -> Iterator[None]:
    """Turn a full disk into a StageError and a place that cannot be written into a UsageError; others pass.

    folder: where the writing goes, for the sentence. advice: what to do about a full disk.
    """
    try:
        yield
    except NexusError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise StageError(f"{folder}: the disk is full; {advice}") from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN and _lies_under(error.filename, folder):
            raise UsageError(
                f"{folder}: cannot be written: {error.strerror}; give a folder you may write to"
            ) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or an exhausted quota, whichever library says it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # safetensors and torch raise errors of their own kind; only the text is left.
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _lies_under(filename: object, folder: Path) -> bool:
    # Only what happens where we write is about writing: a data file that may not be read is another matter.
    if not isinstance(filename, str | bytes | os.PathLike):
        return False
    path, root = Path(os.fsdecode(filename)).absolute(), folder.absolute()
    return path.is_relative_to(root) or root.is_relative_to(path)
