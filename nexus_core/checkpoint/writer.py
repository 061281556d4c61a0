"""Writes safetensors shards tensor by tensor, and the index over them; each appears whole or not at all.

The safetensors library writes a file from tensors that are all in memory. Here the header is written first, from names,
types and shapes, then each tensor at its place as soon as it exists, so a shard may be larger than memory.
Format: 8 bytes header length (little endian), JSON header, data; https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from nexus_core.checkpoint.reader import DTYPES, INDEX_NAME, TensorEntry
from nexus_core.errors import ShapeError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The data of a shard begin at a multiple of this, so that a mapped file gives aligned tensors, as the library does.
ALIGNMENT_BYTES = 8

# How the name of a file ends that is not whole yet.
PARTIAL = ".partial"


@dataclass(frozen=True)
class TensorPlan:
    """Type and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorPlan:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def stored_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class ShardWriter:
    """A safetensors file in the making, given by `shard_writer`: its tensors come in any order, each exactly once."""

    def __init__(self, file: BinaryIO, path: Path, plan: Mapping[str, TensorPlan]):
        self.path, self._file, self._plan = path, file, dict(plan)
        self._missing = dict.fromkeys(plan)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a shard without it
        offsets, end = {}, 0
        for name, tensor in plan.items():
            offsets[name] = end
            end += tensor.stored_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offsets[name], end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % ALIGNMENT_BYTES)
        self._starts = {name: 8 + len(encoded) + offset for name, offset in offsets.items()}
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place. Raises ShapeError if it is not planned, or not so, or already written."""
        if name not in self._plan or name not in self._missing:
            reason = "is written twice" if name in self._plan else "is not planned"
            raise ShapeError(f"{self.path.name}: tensor '{name}' {reason}")
        given = TensorPlan.of(tensor)
        if given != self._plan[name]:
            raise ShapeError(f"{self.path.name}: tensor '{name}' is {given}, but {self._plan[name]} was planned")
        if given.stored_bytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.seek(self._starts[name])
            self._file.write(flat.numpy().data)
        del self._missing[name]

    def finish(self) -> None:
        """Raises ShapeError if a planned tensor was not written."""
        if self._missing:
            raise ShapeError(f"{self.path.name}: tensor '{next(iter(self._missing))}' was planned but not written")


@contextmanager
def shard_writer(path: Path, plan: Mapping[str, TensorPlan]) -> Iterator[ShardWriter]:
    """A writer of one shard, which gets its name once all planned tensors are on the disk; else nothing is left."""
    with atomic_file(path) as file:
        writer = ShardWriter(file, path, plan)
        yield writer
        writer.finish()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name when it is whole and on the disk; after an exception nothing is left of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent, recursive=False)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what writers that were killed left of their files, here and in folders below; nobody may be writing."""
    for path in folder.rglob(f".*{PARTIAL}"):
        if path.is_file():
            path.unlink()


def sync_folder(folder: Path, *, recursive: bool = True) -> None:
    """Have a folder's content on the disk before going on. Hard links are skipped: their bytes are there already."""
    for path in [*folder.rglob("*"), folder] if recursive else [folder]:
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a shard of tensors that are in memory."""
    with shard_writer(path, {name: TensorPlan.of(tensor) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_index(folder: Path, entries: Iterable[TensorEntry]) -> int:
    """Write the index over a folder's shards and return the bytes of all tensors together.

    entries: every tensor of the checkpoint; the index names each one's shard by file name.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    total_bytes = sum(entry.stored_bytes for entry in ordered)
    weight_map = {entry.name: entry.shard.name for entry in ordered}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return total_bytes
