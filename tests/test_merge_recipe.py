"""Merging from a recipe: statistics gathered because a merge needs them, keys, checks, and a plugin's own merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from safetensors.torch import load_file

from nexus_core import hookimpl
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.cli import main
from nexus_core.merge import LayerExperts
from nexus_core.plugins import installed
from nexus_core.recipe import check_against_model, recipe_from
from nexus_core.select import LayerSelection
from nexus_core.stages import collect, convert
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.saliency import FILE_NAME as SALIENCY_NAME
from nexus_core.statistics.saliency import SaliencyFile
from nexus_core.types import ExpertWeights, Strategy

WIDTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", vocabulary=300, tokenizer=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("data")
    for name, words in (("domain", "3 and 4 make 7"), ("general", "a quiet evening by the sea")):
        lines = [json.dumps({"text": f"{number}: {words}, " * (2 + number % 3)}) for number in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: [{"path": str(folder / f"{name}.jsonl")}] for name in ("domain", "general")}


@pytest.fixture
def settings(model: Path, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": {"path": str(model)},
        "data": data,
        "collect": {"tokens": 400, "sequence_length": 32, "batch_size": 3, "keep_inputs": 20},
        "select": {"top_k": 3},
        "convert": {"merge": "neurons", "width": 48},
        "run": {"tracking": {"enabled": False}},
    }


def run_until_convert(settings: dict[str, Any], folder: Path) -> Path:
    (folder / "mine.yaml").write_text(json.dumps(settings))  # JSON is YAML
    store = folder / "runs"
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder / "mine.yaml"), "--until", "convert", "--set", f"run.store={store}"])
    assert not ended.value.code
    return store / "latest" / "mine"


def test_a_merge_that_needs_neuron_saliency_gets_it(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    done = run_until_convert(settings, tmp_path)

    checkpoint = open_checkpoint(model)
    opened = SaliencyFile(done / "collect" / SALIENCY_NAME)
    assert opened.sets == ("domain", "general")
    assert opened.tokens.tolist() == [200, 200]
    statistics, _ = RouterStatistics.load(done / "collect")
    assert bool((statistics.output_norm_sum[statistics.topk_count > 0] > 0).all())
    report = json.loads((done / "convert" / "convert_report.json").read_text())
    assert report["data"] == {"learnt": ["domain"], "kept": ["general"]}
    shared = load_file(done / "convert" / "nexus_shared_experts.safetensors")
    saliency_EF = opened.layer(1, ["domain"], []).learnt_EF
    best = sorted(saliency_EF.ravel().argsort()[::-1][:48].tolist())[0]
    expert = checkpoint.family.hook.nexus_read_expert(
        reader=checkpoint.reader, config=checkpoint.config, layer=1, expert=best // WIDTH, dtype=torch.bfloat16
    )
    first = shared["model.layers.1.mlp.shared_expert.gate_proj.weight"][0]
    assert torch.equal(first, expert.gate[best % WIDTH])


def test_what_is_gathered_is_part_of_the_key_and_only_where_it_is_needed(settings: dict[str, Any]) -> None:
    def keys(**convert_section: object) -> tuple[Any, Any]:
        recipe = recipe_from(settings | {"convert": convert_section})
        return collect.STAGE.settings(recipe), convert.STAGE.settings(recipe)

    needing, not_needing = keys(merge="neurons"), keys(merge="mean")
    assert needing[0]["collect"]["expert_norms"]
    assert not not_needing[0]["collect"]["expert_norms"]
    explicit = recipe_from(settings | {"convert": {}, "collect": settings["collect"] | {"expert_norms": True}})
    assert collect.STAGE.settings(explicit) == needing[0]
    assert (needing[1]["learn"], needing[1]["keep"]) == (["domain"], ["general"])
    assert "learn" not in not_needing[1]


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"convert": {"width": 128}}, "convert.width", "only 3 selected experts .* at most 96"),
        ({"convert": {"merge": "neurons", "width": 257}}, "convert.width", "8 experts have only 256 neurons"),
        ({"convert": {"merge": "neurons"}, "collect": {"data": {"general": 1.0}}}, "convert.merge", "none of those"),
        (
            {"convert": {"merge": "neurons", "contrast": 1.0}, "collect": {"data": {"domain": 1.0}}},
            "convert.contrast",
            "over none",
        ),
        (
            {"convert": {"merge": "aligned", "match": "activations"}, "collect": {"keep_inputs": 0}},
            "convert.match",
            "keep_inputs is 0",
        ),
    ],
)
def test_a_merge_that_cannot_be_is_found_before_anything_is_collected(
    settings: dict[str, Any], model: Path, changes: dict[str, Any], key: str, message: str
) -> None:
    description = open_checkpoint(model).description

    (problem,) = check_against_model(recipe_from(settings | changes), description)

    assert problem.key == key
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem.message)
    assert check_against_model(recipe_from(settings | {"select": {"top_k": "auto"}}), description) == []


def least_important(
    experts: LayerExperts, layer: LayerSelection, width: int, parameters: None, generator: torch.Generator
) -> ExpertWeights:
    """The last of the chosen experts: all that a plugin's merge needs to be."""
    return experts(layer.experts[-1])


@pytest.fixture
def plugin() -> Iterator[None]:
    class Plugin:
        @hookimpl
        def nexus_merge_strategies(self) -> list[Strategy]:
            return [Strategy("least_important", least_important, "the least important of the chosen experts")]

    installed().register(Plugin(), "mine", "this test")
    yield
    installed().unregister("mine")


def test_a_plugins_merge_works_from_a_recipe(
    plugin: None, settings: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_until_convert(settings | {"convert": {"merge": "least_important", "start": "full"}}, tmp_path)

    checkpoint = open_checkpoint(model)
    report = json.loads((done / "convert" / "convert_report.json").read_text())
    shared = load_file(done / "convert" / "nexus_shared_experts.safetensors")
    for layer in report["layers"]:
        expert = checkpoint.family.hook.nexus_read_expert(
            reader=checkpoint.reader,
            config=checkpoint.config,
            layer=layer["layer"],
            expert=layer["experts"][-1],
            dtype=torch.bfloat16,
        )
        assert torch.equal(shared[f"model.layers.{layer['layer']}.mlp.shared_expert.down_proj.weight"], expert.down)

    (tmp_path / "wide").mkdir()
    wide = settings | {"convert": {"merge": "least_important", "width": 64}}
    (tmp_path / "wide" / "mine.yaml").write_text(json.dumps(wide))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "wide" / "mine.yaml"), "--set", f"run.store={tmp_path / 'wide' / 'runs'}"])
    assert ended.value.code == 1
    assert "merge 'least_important' gave a gate of [32, 64] where [64, 64] is wanted" in capsys.readouterr().err
