"""Where an interrupted collect stands, on disk: everything summed so far, so that it goes on to the same bits.

`progress/` in the stage's folder holds one file of tensors and position.json, which names it and its SHA-256. Each is
written beside its place and renamed, the tensors first, so that a process killed at any moment leaves a whole pair.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from nexus_core.checkpoint.writer import write_json, write_shard
from nexus_core.errors import ShapeError

FOLDER_NAME = "progress"
POSITION_NAME = "position.json"

# Sums of 36 layers with 128 experts and the inputs kept of them take 0.2 GB, less than a second to write.
SAVE_EVERY_SECONDS = 60.0

log = logging.getLogger(__name__)


class Savable(Protocol):
    """Something that is added to batch by batch; `restore` puts back exactly what `state` gave."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None: ...


class Standing:
    """Saves sums now and then, and restores them.

    sums: by name; one whose `restore` may refuse comes first. identity: plain text of what the sums depend on; what was
    saved under another one is not used.
    """

    def __init__(self, out: Path, sums: Mapping[str, Savable], identity: str):
        self._folder, self._sums, self._identity = out / FOLDER_NAME, sums, identity
        self._saved = time.monotonic()

    def restore(self) -> int:
        """How many batches were done before, their sums put back; 0 if there is nothing to go on from."""
        position = self._read_position()
        if position is None:
            return 0
        path = self._folder / str(position.get("state"))
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != position.get("sha256"):
                raise ShapeError("its checksum is another one")
            tensors = load(content)
            for name, sums in self._sums.items():
                prefix = f"{name}."
                sums.restore({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
        except (OSError, SafetensorError, ShapeError, KeyError) as error:
            log.warning("collect starts again: %s cannot be used (%s)", path, error)
            return 0
        return int(position["batches"])

    def save_now_and_then(self, batches: int) -> None:
        """Save what was summed over the first `batches` batches, unless that was done a moment ago."""
        if time.monotonic() - self._saved < SAVE_EVERY_SECONDS:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"batches-{batches:08d}.safetensors"
        write_shard(path, {f"{name}.{key}": t for name, sums in self._sums.items() for key, t in sums.state().items()})
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        position = {"batches": batches, "state": path.name, "sha256": checksum, "identity": self._identity}
        write_json(self._folder / POSITION_NAME, position)
        for older in self._folder.glob("batches-*.safetensors"):
            if older != path:
                older.unlink()
        self._saved = time.monotonic()

    def _read_position(self) -> dict[str, Any] | None:
        try:
            position = json.loads((self._folder / POSITION_NAME).read_text())
        except (OSError, ValueError):
            return None
        return position if isinstance(position, dict) and position.get("identity") == self._identity else None


def forget(out: Path) -> None:
    """Remove what was saved in a folder: the work is done."""
    shutil.rmtree(out / FOLDER_NAME, ignore_errors=True)
