"""The folder that a command fills, if the command can go on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import click

from nexus_core.processes import barrier, broadcast, world

IDENTITY_NAME = "nexus_unfinished.json"


@contextmanager
def of_the_first(made: AbstractContextManager[Path]) -> Iterator[Path]:
    """A folder that the first of several processes makes and puts in its place, on all of them."""
    here = world()
    if not here.is_first:
        yield Path(broadcast(""))
        barrier()
        return
    with made as folder:
        broadcast(str(folder))
        yield folder
        barrier()


def resumable_folder(out: Path, identity: Mapping[str, Any]) -> AbstractContextManager[Path]:
    """A folder beside `out` that takes its place when the block ends well and stays, to go on in, when it does not.

    identity: what the output depends on; a folder that was left by work of another identity is refused. Raises
    UsageError for that, and if `out` is a file or not empty. Several processes get the same folder.
    """
    return of_the_first(_resumable_folder(out, identity))


@contextmanager
def _resumable_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    from nexus_core.checkpoint.writer import atomic_file, remove_partial_files, sync_folder
    from nexus_core.errors import UsageError
    from nexus_core.pipeline.disk import storage_errors
    from nexus_core.pipeline.locks import exclusive

    out = Path(out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"--out {out}: is there already; name another folder, or delete it first")
    partial = out.with_name(f".{out.name}.partial")
    text = json.dumps(identity, indent=2, sort_keys=True) + "\n"
    with storage_errors(out.parent, "free some space and type the same command again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out.with_name(f".{out.name}.lock"), lambda owner: click.echo(f"waits for {owner}", err=True)):
            written = partial / IDENTITY_NAME
            if not written.exists():
                # Nobody knows what it was left by; killed right before its end, a command leaves such a folder.
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            if written.exists() and written.read_text() != text:
                raise UsageError(
                    f"--out {out}: {partial} was left by an interrupted run with another model, data or settings; "
                    "repeat that command to go on with it, or delete the folder"
                )
            with atomic_file(written) as file:
                file.write(text.encode())
            try:
                yield partial
            except BaseException:
                # Whatever can be gone on from, checkpoints or sums, is in a folder.
                if not any(path.is_dir() for path in partial.iterdir()):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            written.unlink()
            remove_partial_files(partial)
            sync_folder(partial)
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
