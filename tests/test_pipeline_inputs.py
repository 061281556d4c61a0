"""What is seen before a run begins: data that a later stage would miss, and a config that says too little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from gpt_oss_checkpoints import write_tiny_checkpoint
from prompt_files import write_records

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.documents import is_held_out
from nexus_core.data.formats import opening
from nexus_core.errors import CheckpointError, RecipeError
from nexus_core.pipeline.inputs import check_splits
from nexus_core.pipeline.run import run_recipe
from nexus_core.recipe import Recipe, recipe_from

HELD_OUT = 0.5
ALL_STAGES = ("collect", "select", "convert", "train", "validate")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    return open_checkpoint(write_tiny_checkpoint(folder, vocabulary=320, tokenizer=True))


def texts(count: int, *, held_out: bool) -> list[dict[str, str]]:
    """Records that all fall on one side of the split."""
    records = [{"text": f"number {number} of a few words"} for number in range(100)]
    return [record for record in records if is_held_out(opening("text", record, {}), HELD_OUT) == held_out][:count]


def recipe_over(base: Checkpoint, folder: Path, general: list[dict[str, str]], *overrides: str) -> Recipe:
    both = texts(3, held_out=False) + texts(3, held_out=True)
    sets = {"domain": both, "general": general}
    paths = {name: write_records(folder / f"{name}.jsonl", records) for name, records in sets.items()}
    settings: dict[str, Any] = {
        "schema": 1,
        "model": {"path": str(base.folder)},
        "data": {name: [{"path": str(path), "held_out": HELD_OUT}] for name, path in paths.items()},
        "run": {"store": str(folder / "runs"), "device": "cpu", "tracking": {"enabled": False}},
    }
    return recipe_from(settings, name="small", overrides=overrides)


def test_a_set_without_held_out_records_is_refused_before_anything_runs(base: Checkpoint, tmp_path: Path) -> None:
    recipe = recipe_over(base, tmp_path, texts(4, held_out=False))
    with pytest.raises(RecipeError) as caught:
        run_recipe(recipe)
    (problem,) = caught.value.problems
    assert problem.key == "data.general.0"
    assert "none of its 4 records falls into the part 'held_out' at held_out 0.5; give more" in problem.message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("held_out", "overrides", "stages", "refused"),
    [
        (False, (), ("collect", "select", "convert", "train"), ""),
        (False, ("train.evaluate.every=5",), ("train",), "held_out"),
        (False, ("train.evaluate.every=5", "train.data={domain: 1.0}"), ("train",), ""),
        (True, (), ("train",), "train"),
        (True, ("train.data={domain: 1.0}",), ALL_STAGES, ""),
    ],
)
def test_only_what_a_stage_will_read_has_to_be_there(
    base: Checkpoint, tmp_path: Path, held_out: bool, overrides: tuple[str, ...], stages: tuple[str, ...], refused: str
) -> None:
    recipe = recipe_over(base, tmp_path, texts(2, held_out=held_out), *overrides)
    if not refused:
        check_splits(recipe, stages)
        return
    with pytest.raises(RecipeError, match=f"data.general.0: .*none of its 2 records falls into the part '{refused}'"):
        check_splits(recipe, stages)


def test_check_says_it_too(base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_over(base, tmp_path, texts(4, held_out=False))
    (tmp_path / "small.yaml").write_text(recipe.text)
    assert call("check", tmp_path / "small.yaml") == 2
    assert "data.general.0: " in capsys.readouterr().err


def test_a_config_that_lacks_a_size_is_named_with_its_folder(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    del config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"^{folder}/config\.json: num_local_experts is missing"):
        _ = open_checkpoint(folder).description
