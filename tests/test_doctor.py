"""`nexus doctor`: sound models are called sound, and each kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import call
from gpt_oss_checkpoints import rewrite_tensors, write_tiny_checkpoint
from safetensors.torch import load_file
from training_runs import VOCABULARY, write_converted

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import CheckpointError
from nexus_core.pipeline.doctor import examine

SCALES = "model.layers.1.mlp.experts.down_proj_scales"
ROUTER = "model.layers.0.mlp.router.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model", vocabulary=VOCABULARY, tokenizer=True)


def test_a_whole_model_is_examined_from_weights_to_hours(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in model.rglob("*"))
    text = model.parent / "text.txt"
    text.write_text("It reads this and that.\n\n" * 200)
    assert call("doctor", str(model), "--data", str(text), "--device", "cpu", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tensors"] == len(open_checkpoint(model).reader.entries)
    assert answer["read_bytes"] == sum(entry.stored_bytes for entry in open_checkpoint(model).reader.entries.values())
    assert list(answer["perplexity"]) == ["base"]
    assert list(answer["paces"]) == ["collect", "capture", "train"]
    for stage, pace in answer["paces"].items():
        assert pace["tokens_per_second"] == pytest.approx(256 / pace["seconds"])
        hours = answer["tokens"][stage] / pace["tokens_per_second"] / 3600
        assert answer["hours"][stage] == pytest.approx(hours)
    # Random weights know no language; that is told, but not taken for damage.
    assert answer["verdict"].startswith(("sound", "usable, but its base's perplexity"))
    assert "experts on cpu" in answer["backends"]
    assert sorted(path.name for path in model.rglob("*")) == before


def test_text_that_is_not_there_is_told_before_any_weight_is_read(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus_core.pipeline.doctor.fingerprint", lambda *_, **__: pytest.fail("it was read"))
    assert call("doctor", str(model), "--data", "nope.txt", "--device", "cpu") == 2
    assert "nope.txt: there is no such file" in capsys.readouterr().err


def test_a_converted_model_is_read_as_base_and_as_student(tmp_path: Path) -> None:
    report = examine(write_converted(tmp_path), dtype="float32")
    assert report.perplexity["student"] == report.perplexity["base"]
    assert list(report.paces) == ["collect", "capture", "train"]


def test_without_a_tokenizer_it_reads_random_tokens_and_says_so(tmp_path: Path) -> None:
    report = examine(open_checkpoint(write_tiny_checkpoint(tmp_path / "model")), dtype="float32")
    assert "random tokens, not text" in report.verdict


def replaced(model: Path, name: str, tensor: torch.Tensor) -> None:
    rewrite_tensors(model, drop=name)
    rewrite_tensors(model, add={name: tensor})


def stored(model: Path, name: str) -> torch.Tensor:
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return load_file(model / weight_map[name])[name]


def truncate(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def nan_scale(model: Path) -> None:
    scales = stored(model, SCALES)
    scales[3, 5, 0] = 255
    replaced(model, SCALES, scales)


def nan_weight(model: Path) -> None:
    weight = stored(model, ROUTER)
    weight[2, 7] = float("nan")
    replaced(model, ROUTER, weight)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: rewrite_tensors(model, drop=SCALES), f"tensor '{SCALES}' (layer 1, expert 0) is in no shard"),
        (lambda model: rewrite_tensors(model, drop=ROUTER), ROUTER),
        (truncate, "model-00002-of-00002.safetensors"),
        (nan_scale, f"tensor '{SCALES}' has at [3, 5, 0] the scale 255, which stands for NaN"),
        (nan_weight, f"tensor '{ROUTER}' has a number at [2, 7] that is not finite"),
        (lambda model: replaced(model, ROUTER, torch.zeros(8, 32, dtype=torch.bfloat16)), ROUTER),
    ],
    ids=["no scales", "no router", "cut short", "NaN scale", "NaN weight", "wrong shape"],
)
def test_damage_is_named(model: Path, capsys: pytest.CaptureFixture[str], damage: object, said: str) -> None:
    damage(model)  # type: ignore[operator]
    with pytest.raises(CheckpointError) as caught:
        examine(open_checkpoint(model))
    assert said in str(caught.value)
    assert call("doctor", str(model), "--json") == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["status"], answer["verdict"]) == ("failed", "unusable")
