"""The reader gives what the safetensors library gives, and names what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nexus_core.checkpoint.reader import CheckpointReader, read_header
from nexus_core.errors import CheckpointError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index; tensors of every kind of shape and type."""
    generator = torch.Generator().manual_seed(0)
    first = {
        f"of_{str(dtype).removeprefix('torch.')}": (torch.rand(3, 4, 5, generator=generator) * 8).to(dtype)
        for dtype in DTYPES
    }
    second = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "vector": torch.arange(7)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (
        one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
        if one.dtype
        in (
            torch.float32,
            torch.int64,
        )
        else torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def test_tensors_and_slices_are_those_of_the_safetensors_library(folder: Path) -> None:
    reader = CheckpointReader(folder)
    seen = 0
    for shard in reader.shards:
        with safe_open(shard, framework="pt") as reference:
            for name in reference.keys():  # noqa: SIM118 - not a mapping
                whole = reference.get_tensor(name)
                assert name in reader
                assert same(reader.read(name), whole)
                for index in range(whole.shape[0] if whole.ndim else 0):
                    assert same(reader.read(name, index), whole[index])
                seen += 1
    assert seen == len(list(reader)) == len(DTYPES) + 3


def test_a_slice_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'vector' \[7\] has no slice 7"):
        CheckpointReader(folder).read("vector", 7)
    with pytest.raises(CheckpointError, match=r"tensor 'scalar' \[\] has no slice 0"):
        CheckpointReader(folder).read("scalar", 0)


def test_an_unknown_tensor_is_named_with_a_near_miss(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor 'vektor'; did you mean 'vector'"):
        CheckpointReader(folder).read("vektor")


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: tensor '.*' should end at byte"):
        _ = CheckpointReader(folder).entries


@pytest.mark.parametrize("length", [0, 5, 20])
def test_a_shard_cut_in_its_header_is_named(folder: Path, length: int) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"not a whole safetensors file \({length} bytes\)"):
        read_header(shard)


def test_a_damaged_header_is_named(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[8] = ord("x")
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="header is damaged"):
        read_header(shard)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: named by .*index\.json but missing"):
        _ = CheckpointReader(folder).entries


def test_a_tensor_of_the_index_that_no_shard_has_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tensor 'lost' is missing"):
        _ = CheckpointReader(folder).entries


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match="which is not a plain file name"):
        _ = CheckpointReader(folder).shards


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        _ = CheckpointReader(folder).shards


def test_a_folder_without_shards_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="reads safetensors checkpoints only"):
        _ = CheckpointReader(tmp_path).shards


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "header is damaged"),
        ('{"a": {}}', "header is damaged"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', "header is damaged"),
        ('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}', "has type F4, which NEXUS cannot read"),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', r"has 8 bytes, which do not make F32 \[3\]"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(tmp_path: Path, header: str, message: str) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_header(shard)
