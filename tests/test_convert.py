"""Conversion of a real, very small checkpoint: what it adds, and everything it must leave as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from conversions import (
    CHOSEN,
    EXPERTS,
    HIDDEN,
    LAYERS,
    converted,
    report_of,
    selection,
    shared_experts,
    write_base,
    write_statistics,
)
from gpt_oss_checkpoints import write_tiny_checkpoint

import nexus_core
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import CheckpointError, SelectionError, UsageError
from nexus_core.merge import STRATEGIES
from nexus_core.merge.experts import tensors
from nexus_core.pipeline.store import atomic_folder
from nexus_core.recipe.schema import Convert
from nexus_core.stages.convert import convert

MERGES = [strategy.name for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def base_logits(base: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return nexus_core.load(base, dtype=torch.float32)(input_ids()).logits


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_statistics(tmp_path_factory.mktemp("statistics"))


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every tensor's bytes, with its type and shape, by name."""
    reader = CheckpointReader(checkpoint.folder)
    return {
        name: hashlib.sha256(
            f"{entry.dtype}{entry.shape}".encode() + entry.shard.read_bytes()[entry.start : entry.end]
        ).hexdigest()
        for name, entry in reader.entries.items()
    }


def input_ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def test_every_tensor_of_the_base_has_the_same_sha256_after_conversion(base: Checkpoint, tmp_path: Path) -> None:
    before = digests(base)
    after = digests(converted(base, tmp_path / "out", start="full"))

    assert {name: after[name] for name in before} == before
    routed = [name for name in before if ".experts." in name]
    assert len(routed) == LAYERS * 6
    assert digests(base) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_zero_start_the_logits_are_the_bases_to_the_bit(
    base: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    out = converted(base, tmp_path / "out", start="zero")
    with torch.no_grad():
        expected = nexus_core.load(base, dtype=dtype)(input_ids()).logits
        logits = nexus_core.load(out, dtype=dtype)(input_ids()).logits

    assert torch.equal(logits, expected)
    assert all(expert.gate_proj.weight.count_nonzero() for expert in shared_experts(nexus_core.load(out)))


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_of_every_width_leaves_the_logits_to_the_bit_at_a_zero_start(
    base: Checkpoint, base_logits: torch.Tensor, statistics: Path, tmp_path: Path, merge: str, width: int
) -> None:
    out = converted(base, tmp_path / "out", statistics=statistics, merge=merge, width=width, start="zero")

    model = nexus_core.load(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids()).logits, base_logits)
    for shared in shared_experts(model):
        assert shared.gate_proj.weight.shape == (width, HIDDEN)
        assert shared.gate_proj.weight.any()
    layers = report_of(out)["layers"]
    assert all(layer["relative_output_change"] == 0 for layer in layers)
    assert all(layer["at_full_start"]["relative_change"] > 0 for layer in layers)
    assert (out.folder / "output_change.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("merge", [name for name in MERGES if name != "random"])
def test_a_width_that_makes_no_sense_is_refused_before_anything_is_written(
    base: Checkpoint, statistics: Path, tmp_path: Path, merge: str
) -> None:
    width = 1024 if merge == "neurons" else 96

    with pytest.raises(UsageError, match=f"width is {width}, .* write at most"):
        converted(base, tmp_path / "out", statistics=statistics, merge=merge, width=width)
    assert list((tmp_path / "out").iterdir()) == []


def test_experts_read_by_rows_and_whole_make_the_same(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus_core.merge.experts.TILE_NUMBERS", 5 * HIDDEN)
    by_rows = digests(converted(base, tmp_path / "rows", merge="aligned", start="full"))
    monkeypatch.setattr("nexus_core.plugins.Family.answers", lambda self, hook_name: False)
    whole = digests(converted(base, tmp_path / "whole", merge="aligned", start="full"))

    assert by_rows == whole


def test_with_a_full_start_the_logits_change_and_the_teacher_is_still_the_base(
    base: Checkpoint, tmp_path: Path
) -> None:
    model = nexus_core.load(converted(base, tmp_path / "out", start="full"), dtype=torch.float32)
    with torch.no_grad():
        expected = nexus_core.load(base, dtype=torch.float32)(input_ids()).logits
        assert not torch.allclose(model(input_ids()).logits, expected)
        with nexus_core.as_teacher(model):
            assert torch.equal(model(input_ids()).logits, expected)


@pytest.mark.parametrize("merge", ["mean", "top1"])
def test_the_shared_expert_is_the_merge_of_the_selected_experts(base: Checkpoint, tmp_path: Path, merge: str) -> None:
    model = nexus_core.load(converted(base, tmp_path / "out", merge=merge, start="full"))

    for (layer, chosen), shared in zip(CHOSEN.items(), shared_experts(model), strict=True):
        experts = [
            tensors(
                base.family.hook.nexus_read_expert(
                    reader=base.reader, config=base.config, layer=layer, expert=expert, dtype=torch.float32
                )
            )
            for expert in (chosen if merge == "mean" else chosen[:1])
        ]
        for name, linear in (("gate", shared.gate_proj), ("up", shared.up_proj), ("down", shared.down_proj)):
            for suffix, parameter in (("", linear.weight), ("_bias", linear.bias)):
                expected = torch.stack([expert[name + suffix] for expert in experts]).mean(dim=0)
                torch.testing.assert_close(parameter.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-6)


def test_a_factor_start_scales_the_shared_experts_output(base: Checkpoint, tmp_path: Path) -> None:
    full = nexus_core.load(converted(base, tmp_path / "full", start="full"), dtype=torch.float32)
    half = nexus_core.load(converted(base, tmp_path / "half", start=0.5), dtype=torch.float32)
    hidden_TD = torch.randn(5, HIDDEN)

    for whole, scaled in zip(shared_experts(full), shared_experts(half), strict=True):
        torch.testing.assert_close(scaled(hidden_TD), whole(hidden_TD) / 2)


def test_tokenizer_chat_template_and_generation_settings_come_along(base: Checkpoint, tmp_path: Path) -> None:
    out = converted(base, tmp_path / "out").folder

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base.folder / name).read_bytes()
    assert nexus_core.load(out).generation_config.eos_token_id == [2, 5]


def test_no_file_names_a_place_on_this_machine(base: Checkpoint, tmp_path: Path) -> None:
    out = converted(base, tmp_path / "out").folder

    for path in out.iterdir():
        assert not path.is_symlink()
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(base.folder).encode() not in path.read_bytes()


def test_the_converted_folder_works_after_the_base_is_gone_and_after_a_move(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny_checkpoint(tmp_path / "base", layers=LAYERS, experts=EXPERTS))
    ids = input_ids() % 128
    with torch.no_grad():
        expected = nexus_core.load(base)(ids).logits
    converted(base, tmp_path / "out")

    for path in base.folder.iterdir():
        path.unlink()
    (tmp_path / "out").rename(tmp_path / "moved")

    with torch.no_grad():
        assert torch.equal(nexus_core.load(tmp_path / "moved")(ids).logits, expected)


def test_report_tells_sizes_parameters_and_what_was_left_out(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny_checkpoint(tmp_path / "base", layers=LAYERS, experts=EXPERTS))
    out = converted(base, tmp_path / "out")
    report = report_of(out)

    trainable = sum(
        parameter.numel() for expert in shared_experts(nexus_core.load(out)) for parameter in expert.parameters()
    )
    assert report["trainable_parameters"] == trainable
    assert report["bytes_before"] == sum(entry.stored_bytes for entry in base.reader.entries.values())
    assert report["bytes_after"] == sum(entry.stored_bytes for entry in out.reader.entries.values())
    assert [layer["experts"] for layer in report["layers"]] == [list(experts) for experts in CHOSEN.values()]
    assert [sentence.partition(":")[0] for sentence in report["left_out"]] == ["relative output change", "tokenizer"]


def test_a_converted_model_is_not_converted_again(base: Checkpoint, tmp_path: Path) -> None:
    once = converted(base, tmp_path / "once")

    with pytest.raises(CheckpointError, match="has shared experts already, of width 32; convert its base"):
        converted(once, tmp_path / "twice")
    assert list((tmp_path / "twice").iterdir()) == []


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({0: (1,)}, "no layer 1"),
        ({0: (1,), 1: (1,), 2: (1,)}, "in layer 2"),
        ({0: (1,), 1: (8,)}, "expert 8.* experts 0-7"),
    ],
)
def test_a_selection_of_another_model_is_refused_before_anything_is_written(
    base: Checkpoint, tmp_path: Path, chosen: dict[int, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        convert(base, selection(chosen), Convert(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_behind(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nexus_core.stages.convert.write_index", interrupt)

    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        convert(base, selection(), Convert(), folder)
    assert list(tmp_path.iterdir()) == []
