"""One tiny recipe per family, from a base checkpoint to a trained model that is validated; seconds each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from family_checkpoints import VOCABULARY, WRITERS
from training_runs import write_texts

from nexus_core.additions import RouterDelta, SharedExpert, additions, as_teacher
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.models import load
from nexus_core.pipeline.run import run_recipe
from nexus_core.recipe.load import load_recipe
from nexus_core.routing.parameters import is_selection_bias

TOKENS = torch.arange(2, 42).reshape(2, 20) * 7 % VOCABULARY


def write_recipe(folder: Path, base: Path) -> Path:
    sources = write_texts(folder)
    recipe = {
        "schema": 1,
        "model": {"path": str(base)},
        "data": {name: [{"path": found[0].path, "held_out": 0.3}] for name, found in sources.items()},
        "collect": {"tokens": 800, "sequence_length": 32, "batch_size": 4, "sampling": {"candidates": 40}},
        "select": {"strategy": "pca", "top_k": 3},
        "convert": {"merge": "mean", "start": "zero"},
        "train": {
            "routing": {"strategy": "trainable"},
            "max_steps": 6,
            "learning_rate": 1.0e-2,
            "sequence_length": 32,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "checkpoint_every": 3,
            "schedule": {"kind": "constant", "bias_freeze_ratio": 1.0},
        },
        "validate": {"samples": 8, "sequence_length": 32, "batch_size": 4},
        "run": {"store": str(folder / "runs"), "tracking": {"enabled": False}, "device": "cpu"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize("family", sorted(WRITERS.keys() - {"gpt_oss"}))
def test_a_recipe_runs_from_collect_to_validate(tmp_path: Path, family: str) -> None:
    base = WRITERS[family](tmp_path / "base")
    byte_tokenizer().save_pretrained(base)
    outcomes = {outcome.name: outcome for outcome in run_recipe(load_recipe(write_recipe(tmp_path, base))).outcomes}
    assert list(outcomes) == ["collect", "select", "convert", "train", "validate"]

    # The shared experts and router changes have moved, and switched off, the trained model is the base to the bit.
    trained, untouched = load(outcomes["train"].path / "model", dtype=torch.float32), load(base, dtype=torch.float32)
    layers = len(open_checkpoint(base).description.layers)
    assert [sum(isinstance(a, kind) for a in additions(trained)) for kind in (SharedExpert, RouterDelta)] == [
        layers
    ] * 2
    learnt = [p for addition in additions(trained) for p in addition.named_parameters() if not is_selection_bias(p[0])]
    assert all(parameter.any() for _, parameter in learnt)
    with torch.no_grad():
        changed, expected = trained(TOKENS).logits, untouched(TOKENS).logits
        with as_teacher(trained):
            assert torch.equal(trained(TOKENS).logits, expected)
    assert not torch.equal(changed, expected)

    # Every tensor of the base lies in the trained model's folder with the bytes it had.
    before, after = CheckpointReader(base), CheckpointReader(outcomes["train"].path / "model")
    for name in before:
        assert torch.equal(before.read(name).view(-1).view(torch.uint8), after.read(name).view(-1).view(torch.uint8))

    report = json.loads((outcomes["validate"].path / "report.json").read_text())
    assert set(report["sets"]) == {"domain", "general"}
    domain = report["sets"]["domain"]
    assert domain["student"]["nll_nats_per_token"] < domain["base"]["nll_nats_per_token"]
