"""Where a training run stands, on disk: `checkpoints/step-000100/`, written beside its place and renamed when whole.

Holds what changes and nothing else: trainables.safetensors, optimizer.safetensors and position.json. No pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

TRAINABLES = "trainables.safetensors"
OPTIMIZER = "optimizer.safetensors"
POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """A checkpoint that was read: the step it was written after, its tensors by name, and what else was recorded."""

    step: int
    folder: Path
    trainables: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    record: dict[str, Any]


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
    save_file(_on_cpu(trainables), partial / TRAINABLES)
    save_file(_on_cpu(optimizer), partial / OPTIMIZER)
    (partial / POSITION).write_text(json.dumps({"step": step, **record}, indent=2) + "\n")
    _remove(final)
    partial.rename(final)
    for old in _whole(checkpoints)[keep:]:
        _remove(old)
    return final


def newest_position(checkpoints: Path) -> Position | None:
    """The newest checkpoint that can be read, None if there is none; a damaged one is passed over."""
    for folder in _whole(checkpoints):
        try:
            record = json.loads((folder / POSITION).read_text())
            return Position(
                record["step"], folder, load_file(folder / TRAINABLES), load_file(folder / OPTIMIZER), record
            )
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return None


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


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
