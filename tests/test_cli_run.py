"""`nexus run`, `check` and `explain`: what they say on stdout, and that a broken recipe leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import fake_pipeline
import pytest
from command_line import call
from gpt_oss_checkpoints import write_tiny_checkpoint

from nexus_core.cli.output import print_json
from nexus_core.cli.summary import summary
from nexus_core.errors import StageError
from nexus_core.estimate.model import shared_expert_parameters
from nexus_core.pipeline import plan
from nexus_core.pipeline.run import RunResult
from nexus_core.types import MoeDescription, StageOutcome

RECIPE = """
schema: 1
model: {path: model}
data:
  domain: [{path: domain.jsonl}]
  general: [{path: general.txt}]
select: {top_k: 4}
train: {max_steps: 3, sequence_length: 16}
run: {device: cpu, tracking: {enabled: false}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a tiny model and data, in the folder where the command is typed; the stages are quick fakes."""
    write_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "domain.jsonl").write_text('{"prompt": "1 + 1?", "response": "2"}\n' * 3)
    (tmp_path / "general.txt").write_text("Some text.\n\nAnd more of it.\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "all_stages", fake_pipeline.stages)
    return tmp_path


def last_object(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def test_run_as_json_ends_with_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "recipe.yaml", "--json") == 0
    answer = last_object(capsys)
    assert set(answer) == {"status", "recipe", "stages"}
    assert (answer["status"], answer["recipe"]) == ("done", "recipe")
    assert list(answer["stages"]) == ["gather", "convert", "train"]
    train = answer["stages"]["train"]
    assert set(train) == {"path", "reused", "seconds", "metrics"}
    assert (folder / train["path"] / "stage.json").is_file()
    assert not train["reused"]
    assert call("run", "recipe.yaml", "--json") == 0
    assert all(stage["reused"] for stage in last_object(capsys)["stages"].values())


def test_a_failed_run_as_json_says_what_is_there_and_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int) -> None:
        raise StageError("the loss is not finite")

    monkeypatch.setattr(plan, "all_stages", lambda: fake_pipeline.stages(fail))
    assert call("run", "recipe.yaml", "--json") == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    assert (answer["status"], answer["error"]) == ("failed", "the loss is not finite")
    assert list(answer["stages"]) == ["gather", "convert"]
    assert captured.err.endswith("Error: the loss is not finite\n")


def test_settings_until_and_rerun(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "recipe.yaml", "--until", "convert", "--json") == 0
    assert list(last_object(capsys)["stages"]) == ["gather", "convert"]
    assert call("run", "recipe.yaml", "--set", "train.seed=3", "--rerun", "convert", "--json") == 0
    assert [stage["reused"] for stage in last_object(capsys)["stages"].values()] == [True, False, False]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("top_k: 4", "top_k: 99", "select.top_k"),
        ("top_k: 4", "topk: 4", "topk"),
        ("path: model", "path: nowhere", "nowhere"),
        ("domain.jsonl", "missing.jsonl", "missing.jsonl"),
        ("schema: 1", "schema: [", "recipe.yaml"),
    ],
)
def test_a_broken_recipe_is_misuse_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace(old, new))
    before = sorted(folder.rglob("*"))
    for command in ("run", "check"):
        assert call(command, "recipe.yaml") == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""
    assert call("run", "recipe.yaml", "--json") == 2
    assert last_object(capsys)["status"] == "failed"
    assert sorted(folder.rglob("*")) == before


def test_check_shows_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert call("check", "recipe.yaml") == 0
    said = capsys.readouterr().out
    assert "recipe: valid" in said
    assert "parameters, one shared expert per layer" in said
    assert "train     runs    runs/train/" in said
    assert sorted(folder.rglob("*")) == before
    assert call("run", "recipe.yaml") == 0
    capsys.readouterr()
    assert call("check", "recipe.yaml", "--json") == 0
    answer = last_object(capsys)
    assert answer["status"] == "valid"
    assert all(stage["reused"] for stage in answer["stages"].values())
    assert answer["stages"]["train"]["tokens"] == 3 * 1 * 4 * 16
    assert sum(answer["model"]["stored_bytes"].values()) > 0


def test_check_schema_only_needs_neither_model_nor_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("path: model", "path: no/model").replace("domain.j", "no.j"))
    assert call("check", "recipe.yaml", "--schema-only") == 0
    assert "recipe.yaml: valid; model and data were not looked at" in capsys.readouterr().out
    assert call("check", "recipe.yaml", "--schema-only", "--json") == 0
    assert last_object(capsys) == {"status": "valid", "recipe": "recipe"}


def test_explain_gives_reasons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("explain", "recipe.yaml") == 0
    assert "because  there is no earlier output of gather" in capsys.readouterr().out
    assert call("run", "recipe.yaml") == 0
    capsys.readouterr()
    assert call("explain", "recipe.yaml", "--set", "train.seed=4") == 0
    said = capsys.readouterr().out
    assert "convert   reused   runs/convert/" in said
    assert "because  seed: 0 -> 4" in said
    assert call("explain", "recipe.yaml", "--set", "train.seed=4", "--json") == 0
    answer = last_object(capsys)
    assert answer["stages"]["train"]["reasons"] == ["seed: 0 -> 4"]
    assert answer["stages"]["train"]["compared_with"].startswith("runs/train/")


def said_of(result: RunResult, *, is_tracked: bool = True) -> list[str]:
    return [line.rstrip() for line in click.unstyle(summary(result, is_tracked=is_tracked)).splitlines()]


def test_the_summary_says_what_was_gained_and_forgotten(folder: Path) -> None:
    recipe = fake_pipeline.recipe(folder, run__tracking__enabled="true", run__store="runs")
    metrics = {
        "perplexity/general/base": 12.0,
        "perplexity/general/student": 12.12,
        "change/general": 0.01,
        "perplexity/domain/base": 20.0,
        "perplexity/domain/student": 15.0,
        "change/domain": -0.25,
        "router/l1": 0.21,
        "router/entropy": 1.3,
        "verdict": "gained, nothing forgotten",
    }
    outcomes = (
        StageOutcome("train", "k", Path("runs/train/k"), False, 62.0, {}),
        StageOutcome("validate", "k", Path("runs/validate/k"), True, 1.0, metrics),
    )
    lines = [
        line.rstrip() for line in click.unstyle(summary(RunResult(recipe, outcomes), is_tracked=True)).splitlines()
    ]
    assert "fake  1 stage in 1:02, 1 reused" in lines
    assert "domain              20          15  -25.0%   learnt" in lines
    assert "general             12       12.12  +1.0%    kept" in lines
    assert "verdict: gained, nothing forgotten" in lines
    assert lines.index("domain              20          15  -25.0%   learnt") < lines.index(
        "general             12       12.12  +1.0%    kept"
    )
    assert any(line.startswith("MLflow   mlflow ui --backend-store-uri sqlite:") for line in lines)
    assert "  nexus chat runs/train/k/model" in lines
    assert lines[-1] == "  nexus compare --store runs"
    elsewhere = fake_pipeline.recipe(folder, run__tracking__enabled="true", run__tracking__uri="http://host:5000")
    lines = [
        line.rstrip() for line in click.unstyle(summary(RunResult(elsewhere, outcomes), is_tracked=True)).splitlines()
    ]
    assert "MLflow   http://host:5000" in lines
    assert lines[-1] == "  nexus compare --uri http://host:5000"
    untracked = "\n".join(said_of(RunResult(elsewhere, outcomes), is_tracked=False))
    assert "MLflow" not in untracked
    assert "nexus compare" not in untracked


def test_the_summary_of_a_short_run_says_where_its_output_lies(folder: Path) -> None:
    outcome = StageOutcome("collect", "k", Path("runs/collect/k"), False, 3.0, {})
    said = "\n".join(said_of(RunResult(fake_pipeline.recipe(folder), (outcome,)), is_tracked=False))
    assert "1 stage in 0:03" in said
    assert "output   " in said


@pytest.mark.parametrize(("has_biases", "expected"), [(False, 2 * 3 * 8 * 4), (True, 2 * (3 * 8 * 4 + 2 * 4 + 8))])
def test_parameters_of_the_shared_experts(has_biases: bool, expected: int) -> None:
    description = MoeDescription(
        *("f", "f", (1, 2), 16, 2, 8, 4, 100, "float32"), weights_sum_to_one=True, has_expert_biases=has_biases
    )
    assert shared_expert_parameters(description, None) == expected


def test_gpt_oss_120b_trains_as_many_parameters_as_published() -> None:
    description = MoeDescription(
        *("f", "f", tuple(range(36)), 128, 4, 2880, 2880, 201088, "mxfp4"),
        weights_sum_to_one=True,
        has_expert_biases=True,
    )
    assert round(shared_expert_parameters(description, None) / 1e6) == 896


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [Path("x"), {"c": float("inf")}], "d": (1, "ü")})
    assert capsys.readouterr().out == '{"a": null, "b": ["x", {"c": null}], "d": [1, "ü"]}\n'
