"""Tells one checkpoint, or one data file, from another by content: 65 GB in seconds.

What a file is called from outside, where it lies and when it was written play no part. A shard is known by its header
(every tensor's name, type, shape and place), its size, and blocks sampled at fixed places; `verify` reads every byte
instead. Files small enough to read whole are always read whole, and then `verify` changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.errors import CheckpointError

BLOCK_BYTES = 4096
SAMPLED_BLOCKS = 64

# A shard up to this size is read whole: it costs milliseconds, and sampling would gain nothing.
WHOLE_SHARD_BYTES = 8 * 2**20

# Everything beside config and weights that a stage reads or hands on to a converted checkpoint.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

_READ_BYTES = 4 * 2**20


def fingerprint(folder: Path, *, verify: bool = False) -> str:
    """64 hexadecimal digits that differ when the checkpoint's config, tensors or tokenizer do.

    verify: hash every byte of the weights, so that a change between two sampled blocks cannot go unseen.
    Raises CheckpointError if config.json or a shard is missing, damaged or cut short.
    """
    folder = Path(folder)
    reader = CheckpointReader(folder)
    whole: dict[str, Any] = {"config": _json_content(folder / "config.json")}
    whole["tensors"] = {
        name: [entry.shard.name, entry.dtype, entry.shape, entry.start, entry.end]
        for name, entry in reader.entries.items()
    }
    whole["shards"] = {
        shard.name: content_digest(shard, whole_up_to=WHOLE_SHARD_BYTES, verify=verify) for shard in reader.shards
    }
    whole["companions"] = {
        name: content_digest(folder / name, whole_up_to=WHOLE_SHARD_BYTES, verify=True)
        for name in COMPANIONS
        if (folder / name).is_file()
    }
    return digest(whole)


def base_identity(folder: Path, *, own_shards: frozenset[str]) -> str:
    """64 hexadecimal digits that a base checkpoint shares with everything that was made from it by adding to it.

    own_shards: names of the shards that hold what was added; all others are linked, so their content is the base's.
    """
    shards = [shard for shard in CheckpointReader(Path(folder)).shards if shard.name not in own_shards]
    return digest(sorted(content_digest(shard, whole_up_to=WHOLE_SHARD_BYTES) for shard in shards))


def content_digest(path: Path, *, whole_up_to: int, verify: bool = False) -> str:
    """SHA-256 of a file's size and content: of all of it up to `whole_up_to` bytes or with `verify`, else of blocks.

    Raises CheckpointError if the file cannot be read.
    """
    try:
        size = path.stat().st_size
        total = hashlib.sha256(f"{size}:".encode())
        with path.open("rb", buffering=0) as file:
            if verify or size <= whole_up_to:
                while chunk := file.read(_READ_BYTES):
                    total.update(chunk)
            else:
                for start in block_starts(size):
                    total.update(os.pread(file.fileno(), BLOCK_BYTES, start))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return total.hexdigest()


def block_starts(size: int) -> list[int]:
    """Where the sampled blocks of a file of `size` bytes begin: the first, the last, and evenly between."""
    last = max(size - BLOCK_BYTES, 0)
    return sorted({last * step // (SAMPLED_BLOCKS - 1) for step in range(SAMPLED_BLOCKS)})


def digest(plain: Any) -> str:
    """SHA-256 of plain data (dicts, lists, numbers, text, None), whatever order its keys are in."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _json_content(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
