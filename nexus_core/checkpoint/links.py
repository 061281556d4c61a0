"""Brings a source checkpoint's own files into a new folder: shards linked, tokenizer and the like copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from nexus_core.checkpoint.reader import INDEX_NAME, SINGLE_NAME, CheckpointReader, TensorEntry
from nexus_core.errors import CheckpointError
from nexus_core.progress import Progress

LinkKind = Literal["hard link", "copy"]

CONFIG_NAME = "config.json"

# A lone shard must not keep its name: transformers loads model.safetensors alone and never looks at the index.
LONE_SHARD_NAME = "model-00001-of-00001.safetensors"

# Weights of other formats, which a NEXUS checkpoint has no use for.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")

# A checkpoint without any of these has no tokenizer of its own.
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")

BLOCK_BYTES = 1 << 24


def link_shards(
    reader: CheckpointReader, out: Path, left_out: Iterable[str] = ()
) -> tuple[LinkKind, list[TensorEntry]]:
    """Put a checkpoint's shards, untouched, into another folder; says how, and where each tensor now lies.

    left_out: file names of shards that stay behind. A hard link takes no space and outlives the source folder; where
    none can be made (another file system, or a file of another owner) the shards are copied. Never a symbolic link:
    it breaks when the source moves.
    """
    placed = {
        shard: out / (LONE_SHARD_NAME if shard.name == SINGLE_NAME else shard.name)
        for shard in reader.shards
        if shard.name not in left_out
    }
    to_copy = {shard: place for shard, place in placed.items() if not _hard_link(shard, place)}
    if to_copy:
        with Progress("copy", sum(shard.stat().st_size for shard in to_copy), "bytes") as progress:
            for shard, place in to_copy.items():
                copy_file(shard, place, progress.advance)
    entries = [replace(entry, shard=placed[entry.shard]) for entry in reader.entries.values() if entry.shard in placed]
    return "copy" if to_copy else "hard link", entries


def _hard_link(source: Path, destination: Path) -> bool:
    try:
        # In the Hub's cache a shard is a symbolic link into a folder of blobs: link the blob, not the link.
        os.link(source.resolve(), destination)
    except FileExistsError:
        raise
    except OSError:
        return False  # EXDEV, EPERM, EMLINK, ENOTSUP, ...: whatever the reason, a copy is right
    return True


def copy_file(source: Path, destination: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Copy a file's contents, not its permissions: the source may be read-only, and the copy is the user's.

    advance: told the bytes of each block. Raises CheckpointError if the source cannot be read.
    """
    try:
        reading = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
    with reading, destination.open("xb") as writing:
        while block := reading.read(BLOCK_BYTES):
            writing.write(block)
            advance(len(block))


def companion_files(folder: Path, own: Iterable[str] = ()) -> list[Path]:
    """A checkpoint's files beside weights, index and config: tokenizer, chat template, generation settings, licence.

    own: names of files that say something of the folder itself, and are left. Hidden files and subfolders, which hold
    other formats' weights, are left too.
    """
    skipped = {CONFIG_NAME, INDEX_NAME, *own}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in skipped
        and not path.name.startswith(".")
        and not path.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
    ]


def copy_companions(folder: Path, out: Path, own: Iterable[str] = ()) -> list[str]:
    """Copy a checkpoint's companion files and return their names; see `companion_files`."""
    files = companion_files(folder, own)
    for path in files:
        copy_file(path, out / path.name)
    return [path.name for path in files]
