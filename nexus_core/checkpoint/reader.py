"""Reads tensors, or slices of their first dimension, out of safetensors shards by position.

The safetensors library maps files into memory; mapped pages of a 60 GB checkpoint count as resident and make memory
figures meaningless. Converting needs a few slices, so they are read with positioned reads into tensors of their own.
Format: 8 bytes header length (little endian), JSON header, data; https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nexus_core.errors import CheckpointError, suggestion

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# A header longer than this is not a header: the format's own limit.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its shard, type, shape, and the bytes [start, end) in the file."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def stored_bytes(self) -> int:
        return self.end - self.start


def read_header(shard: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises CheckpointError if the file is cut short or is not one."""
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{shard}: not a whole safetensors file ({size} bytes); copy or download it again"
                )
            header = dict(json.loads(file.read(length)).items())
    except OSError as error:
        raise CheckpointError(f"{shard}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{shard}: its safetensors header is damaged; copy or download it again") from error
    entries = {name: _entry(shard, name, item, 8 + length) for name, item in header.items() if name != "__metadata__"}
    for entry in entries.values():
        if entry.end > size:
            raise CheckpointError(
                f"{shard}: tensor '{entry.name}' should end at byte {entry.end} but the file has {size}; "
                "it is truncated, copy or download it again"
            )
    return entries


def _entry(shard: Path, name: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    try:
        start, end = (data_start + int(offset) for offset in item["data_offsets"])
        dtype, shape = str(item["dtype"]), tuple(int(size) for size in item["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{shard}: its safetensors header is damaged; copy or download it again") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{shard}: tensor '{name}' has type {dtype}, which NEXUS cannot read")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{shard}: tensor '{name}' has {end - start} bytes, which do not make {dtype} {list(shape)}"
        )
    return TensorEntry(name, shard, dtype, shape, start, end)


class CheckpointReader:
    """The tensors of a checkpoint folder by name, over all its shards.

    Raises CheckpointError if there are no shards, a shard of the index is missing or cut short, or a tensor is not
    in the shard that the index says.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, by name."""
        index = self.folder / INDEX_NAME
        if index.is_file():
            return [self.folder / name for name in sorted(set(self._weight_map.values()))]
        if (self.folder / SINGLE_NAME).is_file():
            return [self.folder / SINGLE_NAME]
        raise CheckpointError(
            f"{self.folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}; NEXUS reads safetensors checkpoints only"
        )

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX_NAME
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"].items())
            outside = [name for name in weight_map.values() if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: is not a safetensors index; copy or download it again") from error
        if outside:
            raise CheckpointError(f"{index}: names the shard '{outside[0]}', which is not a plain file name")
        return weight_map

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor's place, by name; reads all headers."""
        entries: dict[str, TensorEntry] = {}
        for shard in self.shards:
            if not shard.is_file():
                raise CheckpointError(f"{shard}: named by {INDEX_NAME} but missing; copy or download it")
            entries |= read_header(shard)
        if (self.folder / INDEX_NAME).is_file():
            for name, shard_name in self._weight_map.items():
                if name not in entries or entries[name].shard.name != shard_name:
                    raise CheckpointError(
                        f"{self.folder / shard_name}: tensor '{name}' is missing; {INDEX_NAME} names it"
                    )
        return entries

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies. Raises CheckpointError if there is none of that name."""
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: has no tensor '{name}'{_nearest(name, self.entries)}")
        return self.entries[name]

    def read(self, name: str, index: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or its slice `[index]` along the first dimension, in its stored type; see `read_tensor`."""
        return read_tensor(self.entry(name), index, rows)


def read_tensor(entry: TensorEntry, index: int | None = None, rows: slice | None = None) -> torch.Tensor:
    """The tensor at a place that `read_header` gave, or its slice `[index]` along the first dimension.

    rows: of what that leaves, only these along its first dimension, start and stop; only their bytes are read.
    """
    shape, start, length = entry.shape, entry.start, entry.stored_bytes
    if index is not None:
        if not shape or not 0 <= index < shape[0]:
            raise CheckpointError(f"{entry.shard}: tensor '{entry.name}' {list(shape)} has no slice {index}")
        length //= shape[0]
        start, shape = start + index * length, shape[1:]
    if rows is not None:
        if not shape or not 0 <= rows.start <= rows.stop <= shape[0]:
            raise CheckpointError(f"{entry.shard}: tensor '{entry.name}' {list(entry.shape)} has no rows {rows}")
        row_bytes = length // shape[0] if shape[0] else 0
        start, length = start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
        shape = (rows.stop - rows.start, *shape[1:])
    return read_bytes(entry.shard, start, length).view(DTYPES[entry.dtype]).reshape(shape)


def read_bytes(path: Path, start: int, length: int) -> torch.Tensor:
    """Bytes [start, start + length) of a file as a uint8 tensor that owns its memory."""
    buffer = torch.empty(length, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < length:
                count = os.preadv(file.fileno(), [view[done:]], start + done)
                if count == 0:
                    raise CheckpointError(f"{path}: ends before byte {start + length}; copy or download it again")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return buffer


def _nearest(name: str, known: dict[str, TensorEntry]) -> str:
    # A checkpoint has hundreds of names: only a near miss helps.
    hint = suggestion(name, known)
    return hint if "did you mean" in hint else ""
