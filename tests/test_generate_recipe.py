"""Text that the base writes, in a recipe: keys, what is written for whom, checks, and several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpt_oss_checkpoints import write_tiny_checkpoint
from prompt_files import read_records, write_questions, write_records

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import RecipeError
from nexus_core.pipeline.inputs import check_inputs
from nexus_core.pipeline.keys import data_identity
from nexus_core.pipeline.plan import Plan, plan_recipe
from nexus_core.pipeline.run import run_recipe
from nexus_core.recipe import load_recipe, recipe_from

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_generated.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    return open_checkpoint(write_tiny_checkpoint(folder, vocabulary=320, tokenizer=True))


def recipe_over(base: Checkpoint, folder: Path, *overrides: str, **changes: Any) -> Any:
    if not (folder / "domain.jsonl").exists():
        write_records(folder / "domain.jsonl", [{"text": f"some words {n}" * 5} for n in range(60)])
        write_questions(folder, 40)
    value = {
        "schema": 1,
        "model": {"path": str(base.folder)},
        "generate": {"replies": {"prompts": [{"path": str(folder / "prompts.jsonl")}], "max_new_tokens": 6}},
        "data": {
            "domain": [{"path": str(folder / "domain.jsonl")}],
            "general": [{"path": "generated:replies", "held_out": 0.3}],
        },
        "run": {"store": str(folder / "runs"), "device": "cpu", "tracking": {"enabled": False}},
    }
    return recipe_from(value | changes, overrides=overrides)


def keys(plan: Plan) -> dict[str, str]:
    return {step.stage.name: step.key for step in plan.steps}


def test_the_key_is_made_of_prompts_model_and_settings_and_only_readers_follow(base, tmp_path) -> None:
    only_domain = "collect.data={domain: 1.0}"
    before = keys(plan_recipe(recipe_over(base, tmp_path, only_domain)))
    assert list(before) == ["generate", "collect", "select", "convert", "train", "validate"]
    moved = keys(plan_recipe(recipe_over(base, tmp_path, only_domain, "train.max_steps=7")))
    assert moved["generate"] == before["generate"]
    other = keys(plan_recipe(recipe_over(base, tmp_path, only_domain, "generate.replies.temperature=0.5")))
    changed = {name for name in before if before[name] != other[name]}
    assert changed == {"generate", "train", "validate"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "another?"}) + "\n")
    data_identity.cache_clear()
    other = keys(plan_recipe(recipe_over(base, tmp_path, only_domain)))
    assert {name for name in before if before[name] != other[name]} == {"generate", "train", "validate"}
    everything = plan_recipe(recipe_over(base, tmp_path))
    assert next(step for step in everything.steps if step.stage.name == "collect").stage.inputs == ("generate",)


def test_until_collect_nothing_is_written_that_it_does_not_read(base, tmp_path) -> None:
    found = plan_recipe(recipe_over(base, tmp_path, "collect.data={domain: 1.0}"), until="collect")
    assert list(keys(found)) == ["collect"]
    assert list(keys(plan_recipe(recipe_over(base, tmp_path), until="collect"))) == ["generate", "collect"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"generate": {}}, "data.general.0.path: there is no section under generate called 'replies'"),
        (
            {"data": {"domain": [{"path": "generated:replys"}]}},
            "there is no section under generate called 'replys'; did you mean 'replies'?",
        ),
        (
            {"data": {"domain": [{"path": "x.txt"}]}},
            "generate.replies: is read by no data set; write 'path: generated:replies' under data, or remove it",
        ),
        ({"generate": {"a b": {"prompts": [{"path": "x.txt"}]}}}, "is made of letters, digits, '_' and '-' only"),
        ({"generate": {"replies": {"prompts": []}}}, "generate.replies.prompts"),
        ({"generate": {"replies": {"prompts": [{"path": "x", "weight": 1.0}]}}}, "unknown key"),
    ],
)
def test_what_does_not_fit_together_is_told(base, tmp_path, changes, problem) -> None:
    with pytest.raises(RecipeError) as found:
        recipe_over(base, tmp_path, **changes)
    assert problem in str(found.value)


def test_prompts_that_are_not_there_are_told_before_anything_runs(base, tmp_path) -> None:
    recipe = recipe_over(base, tmp_path, "generate.replies.prompts.0.path=nowhere.jsonl")
    with pytest.raises(RecipeError, match=r"generate\.replies\.prompts\.0: nowhere\.jsonl: there is no such file"):
        check_inputs(recipe, base)
    check_inputs(recipe_over(base, tmp_path), base)


def test_two_processes_write_what_one_does(base, tmp_path, monkeypatch) -> None:
    domain = write_records(tmp_path / "domain.jsonl", [{"text": "some words"}])
    prompts = write_questions(tmp_path, 70)  # two chunks
    value = {
        "schema": 1,
        "model": {"path": str(base.folder)},
        "generate": {"replies": {"prompts": [{"path": prompts}], "max_new_tokens": 3}},
        "data": {"domain": [{"path": domain}], "general": [{"path": "generated:replies"}]},
        "run": {"device": "cpu", "tracking": {"enabled": False}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(value))
    one = run_recipe(
        load_recipe(tmp_path / "recipe.yaml", [f"run.store={tmp_path / 'one'}"]), until="generate"
    ).outcome("generate")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--until", "generate", "--processes", "2", "--set", f"run.store={tmp_path / 'two'}"]
    command = [sys.executable, "-m", "nexus_core", "run", str(tmp_path / "recipe.yaml"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two" / "generate" / one.key
    for name in ("replies.jsonl", "report.json"):
        assert (two / name).read_bytes() == (one.path / name).read_bytes()
    assert len(read_records(two / "replies.jsonl")) == one.metrics["completions"] > 64


def test_the_shipped_recipe_runs_and_every_stage_reads_what_was_written(tmp_path) -> None:
    written = ("replies", "continuations")
    small = [
        *("replies.prompts.0.max_records=20", "replies.max_new_tokens=6", "continuations.prompts.0.max_records=16"),
        *("continuations.prompts.1.max_records=16", "continuations.max_new_tokens=6"),
    ]
    overrides = [
        *(f"generate.{assignment}" for assignment in small),
        f"data.general=[{', '.join(f'{{path: generated:{name}, held_out: 0.3}}' for name in written)}]",
        *("collect.tokens=600", "collect.sequence_length=64", "train.max_steps=2", "train.sequence_length=32"),
        *("train.batch_size=2", "train.teacher.kind=offline", "validate.samples=4", "validate.sequence_length=32"),
        *(f"run.store={tmp_path / 'runs'}", "run.tracking.enabled=false", "run.device=cpu"),
    ]
    result = run_recipe(load_recipe(RECIPE, overrides))
    counts = result.outcome("generate").metrics
    assert counts["completions"] + counts["empty"] == 52
    assert result.outcome("capture").metrics["kept_tokens"] > 0
    report = json.loads((result.outcome("collect").path / "sampling_report.json").read_text())
    assert [source["format"] for source in report["sets"]["general"]["sources"]] == ["generated", "generated"]
    kept = json.loads((result.outcome("validate").path / "report.json").read_text())["sets"]["general"]
    assert kept["tokens"] > 0
    again = run_recipe(load_recipe(RECIPE, overrides))
    assert all(outcome.reused for outcome in again.outcomes)
