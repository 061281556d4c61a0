"""Fingerprints: content in, place and time out, samples unless told to read all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nexus_core.checkpoint.fingerprint import BLOCK_BYTES, SAMPLED_BLOCKS, WHOLE_SHARD_BYTES, block_starts, fingerprint
from nexus_core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 4}))
    (model / "tokenizer.json").write_text("{}")
    save_file({"a": torch.arange(8.0), "b": torch.ones(2, 2)}, model / "model.safetensors")
    return model


def test_place_time_and_layout_of_the_config_do_not_matter(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(moved / "model.safetensors", (1, 1))
    (moved / "config.json").write_text('{"hidden_size":4,\n "model_type":"x"}')
    (moved / "README.md").write_text("not read by any stage")
    assert fingerprint(moved) == before
    assert len(before) == 64


@pytest.mark.parametrize("change", ["config", "tensor value", "tensor name", "tokenizer", "new companion", "shards"])
def test_every_part_matters(folder: Path, change: str) -> None:
    before = fingerprint(folder)
    match change:
        case "config":
            (folder / "config.json").write_text('{"model_type": "x", "hidden_size": 8}')
        case "tensor value":
            save_file({"a": torch.arange(8.0), "b": torch.zeros(2, 2)}, folder / "model.safetensors")
        case "tensor name":
            save_file({"a": torch.arange(8.0), "c": torch.ones(2, 2)}, folder / "model.safetensors")
        case "tokenizer":
            (folder / "tokenizer.json").write_text('{"a": 1}')
        case "new companion":
            (folder / "chat_template.jinja").write_text("{{ messages }}")
        case "shards":
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors"}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(folder) != before


def test_a_truncated_shard_is_a_checkpoint_error(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="it is truncated, copy or download it again"):
        fingerprint(folder)


def test_a_missing_config_is_a_checkpoint_error(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        fingerprint(folder)


def test_blocks_are_first_last_and_evenly_between() -> None:
    starts = block_starts(10**9)
    assert len(starts) == SAMPLED_BLOCKS
    assert starts[0] == 0
    assert starts[-1] == 10**9 - BLOCK_BYTES
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1
    assert block_starts(100) == [0]


def test_a_byte_between_blocks_is_seen_only_when_verifying(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shard = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(WHOLE_SHARD_BYTES * 2, dtype=torch.uint8)}, shard)
    sampled, verified = fingerprint(tmp_path), fingerprint(tmp_path, verify=True)
    start = block_starts(shard.stat().st_size)[1]
    with shard.open("r+b") as file:
        file.seek(start + BLOCK_BYTES + 1)
        file.write(b"\1")
    assert fingerprint(tmp_path) == sampled
    assert fingerprint(tmp_path, verify=True) != verified
    with shard.open("r+b") as file:
        file.seek(start + 1)
        file.write(b"\1")
    assert fingerprint(tmp_path) != sampled


def test_verifying_changes_nothing_for_small_shards(folder: Path) -> None:
    assert fingerprint(folder, verify=True) == fingerprint(folder)


def test_65_gb_take_seconds(tmp_path: Path) -> None:
    """Fifteen shards of 4.3 GB, as gpt-oss-120b has, as files with holes: the reads are the same."""
    (tmp_path / "config.json").write_text("{}")
    weight_map = {}
    for number in range(15):
        name, length = f"model-{number}.safetensors", 4_300_000_000
        header = json.dumps({f"t{number}": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + length)
        weight_map[f"t{number}"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    started = time.monotonic()
    fingerprint(tmp_path)
    assert time.monotonic() - started < 5
