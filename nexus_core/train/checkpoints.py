"""Where a training run stands, on disk: `checkpoints/step-000100/`, written beside its place and renamed when whole.

Holds what changes and nothing else: trainables.safetensors, optimizer.safetensors and position.json. No pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nexus_core.checkpoint.writer import sync_folder, write_shard

TRAINABLES = "trainables.safetensors"
OPTIMIZER = "optimizer.safetensors"
POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """A checkpoint: the step it was written after, its tensors by name, and what else was recorded.

    A tensor is read when it is asked for: of the optimizer's, each of several processes wants a part only.
    """

    step: int
    folder: Path
    trainables: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Position:
        """Raises OSError, ValueError, KeyError or SafetensorError if it is damaged."""
        record = json.loads((folder / POSITION).read_text())
        return cls(record["step"], folder, _Tensors(folder / TRAINABLES), _Tensors(folder / OPTIMIZER), record)


def write_position(
    checkpoints: Path,
    step: int,
    trainables: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of a step, remove all but the `keep` newest, return its folder."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    final = checkpoints / f"step-{step:06d}"
    partial = checkpoints / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    # One tensor at a time, so that neither masters nor moments of a GPU are whole in the machine's memory.
    write_shard(partial / TRAINABLES, trainables)
    write_shard(partial / OPTIMIZER, optimizer)
    (partial / POSITION).write_text(json.dumps({"step": step, **record}, indent=2) + "\n")
    # The rename must not reach the disk before the content does.
    sync_folder(partial)
    _remove(final)
    partial.rename(final)
    for old in _whole(checkpoints)[keep:]:
        _remove(old)
    return final


def newest_position(checkpoints: Path) -> Position | None:
    """The newest checkpoint that can be read, None if there is none; a damaged one is passed over."""
    for folder in _whole(checkpoints):
        try:
            return Position.read(folder)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return None


class _Tensors(Mapping[str, torch.Tensor]):
    """A safetensors file, open; that it is as long as its header says is checked at once."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _whole(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = {int(path.name.removeprefix("step-")): path for path in checkpoints.glob("step-*") if path.suffix == ""}
    return [folders[step] for step in sorted(folders, reverse=True)]


def _remove(folder: Path) -> None:
    # Renamed first: a folder of a checkpoint's name is always whole, also if this is interrupted.
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
