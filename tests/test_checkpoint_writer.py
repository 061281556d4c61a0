"""Shards and index: written tensor by tensor, whole or not at all; source files linked, never changed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nexus_core.checkpoint.links import LONE_SHARD_NAME, copy_companions, link_shards
from nexus_core.checkpoint.reader import CheckpointReader, read_header
from nexus_core.checkpoint.writer import TensorPlan, shard_writer, write_index, write_shard
from nexus_core.errors import CheckpointError, ShapeError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.blocks": torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16),
    "c.bias": torch.randn(7).bfloat16(),
    "d.empty": torch.empty(0, 4),
    "e.scalar": torch.tensor(2.5),
}


def test_a_shard_reads_back_bit_for_bit_through_the_safetensors_library(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard.safetensors", TENSORS)

    read = load_file(tmp_path / "shard.safetensors")
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "shard.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tensors_may_come_in_any_order_and_need_not_be_contiguous(tmp_path: Path) -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T
    plan = {"x": TensorPlan.of(transposed), "y": TensorPlan(torch.int64, (2,))}

    with shard_writer(tmp_path / "s.safetensors", plan) as writer:
        writer.write("y", torch.tensor([1, 2]))
        writer.write("x", transposed)

    assert torch.equal(load_file(tmp_path / "s.safetensors")["x"], transposed)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", torch.zeros(3), r"'x' is float32 \[3\], but float32 \[2\] was planned"),
        ("x", torch.zeros(2).half(), r"'x' is float16 \[2\], but float32"),
        ("z", torch.zeros(2), "'z' is not planned"),
    ],
)
def test_what_was_not_planned_is_refused_and_leaves_nothing(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with (
        pytest.raises(ShapeError, match=message),
        shard_writer(tmp_path / "s.safetensors", {"x": TensorPlan(torch.float32, (2,))}) as writer,
    ):
        writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_planned_tensor_that_never_came_is_named(tmp_path: Path) -> None:
    plan = {"x": TensorPlan(torch.float32, (2,))}
    with pytest.raises(ShapeError, match="'x' was planned but not written"), shard_writer(tmp_path / "s", plan):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_what_was_there_before(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.safetensors", {"x": torch.ones(2)})
    plan = {"x": TensorPlan(torch.float32, (2,))}

    with pytest.raises(KeyboardInterrupt), shard_writer(tmp_path / "s.safetensors", plan):
        raise KeyboardInterrupt

    assert torch.equal(load_file(tmp_path / "s.safetensors")["x"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def lone_checkpoint(folder: Path) -> CheckpointReader:
    folder.mkdir()
    save_file({"x": torch.ones(3), "y": torch.zeros(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    return CheckpointReader(folder)


def test_a_lone_shard_is_linked_under_another_name_so_that_the_index_counts(tmp_path: Path) -> None:
    source, out = lone_checkpoint(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    write_shard(out / "added.safetensors", {"z": torch.ones(5).bfloat16()})

    kind, entries = link_shards(source, out)
    total_bytes = write_index(out, [*entries, *read_header(out / "added.safetensors").values()])

    assert kind == "hard link"
    assert (out / LONE_SHARD_NAME).samefile(tmp_path / "base/model.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total_bytes == 4 * 3 + 4 * 4 + 2 * 5
    assert index["weight_map"] == {"x": LONE_SHARD_NAME, "y": LONE_SHARD_NAME, "z": "added.safetensors"}
    assert torch.equal(CheckpointReader(out).read("z"), torch.ones(5).bfloat16())


def test_a_linked_shard_outlives_its_source(tmp_path: Path) -> None:
    source, out = lone_checkpoint(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    _, entries = link_shards(source, out)
    write_index(out, entries)

    (tmp_path / "base/model.safetensors").unlink()

    assert torch.equal(CheckpointReader(out).read("x"), torch.ones(3))


def test_a_shard_behind_a_symbolic_link_is_linked_itself(tmp_path: Path) -> None:
    source, out = lone_checkpoint(tmp_path / "base"), tmp_path / "out"
    (tmp_path / "blob").write_bytes((tmp_path / "base/model.safetensors").read_bytes())
    (tmp_path / "base/model.safetensors").unlink()
    (tmp_path / "base/model.safetensors").symlink_to("../blob")
    out.mkdir()

    link_shards(source, out)

    assert not (out / LONE_SHARD_NAME).is_symlink()
    assert (out / LONE_SHARD_NAME).samefile(tmp_path / "blob")


def test_shards_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    source, out = lone_checkpoint(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "link", refuse)

    kind, _ = link_shards(source, out)

    assert kind == "copy"
    assert (out / LONE_SHARD_NAME).read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


def test_companions_are_everything_but_weights_index_config_and_hidden_files(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    names = (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        ".gitattributes",
    )
    weights = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "weights.gguf")
    (base / "original").mkdir(parents=True)
    out.mkdir()
    for name in (*names, *weights, "convert_report.json"):
        (base / name).write_text(name)
    (base / "tokenizer.json").chmod(0o444)

    copied = copy_companions(base, out, own=["convert_report.json"])

    assert copied == ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == copied
    assert os.access(out / "tokenizer.json", os.W_OK)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_companion_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "base/tokenizer.json").touch(0o000)

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read: Permission denied"):
        copy_companions(tmp_path / "base", tmp_path / "out")
