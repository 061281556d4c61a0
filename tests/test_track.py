"""Runs in MLflow: a real client on an sqlite file, driven through a real plugin manager."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_core import hookspecs
from nexus_core.plugins import Plugins
from nexus_core.recipe.schema import Tracking
from nexus_core.track.connection import connect, default_uri
from nexus_core.track.observer import MlflowObserver, artifacts
from nexus_core.types import RunDescription, StageOutcome

SETTINGS: dict[str, Any] = {
    "schema": 1,
    "data": {"domain": [{"path": "math.jsonl", "weight": 1.0}], "general": [{"path": "x" * 7000, "weight": 1.0}]},
    "train": {
        "data": {"domain": 0.75, "general": 0.25},
        "learn": None,
        "losses": {},
        "schedule": {"temperature": [4.0, 2.0]},
    },
}
MEASURED = {
    "perplexity/domain/base": 10.0,
    "perplexity/domain/student": 8.0,
    "change/domain": -0.2,
    "router/l1": 0.1,
    "tokens": 512,
    "verdict": "gained and retained",
}


class Recording:
    """One observed run, with what its tests need to look it up."""

    def __init__(self, store: Path, tracking: Tracking | None = None, recipe: str = "tiny"):
        self.store = store
        self.plugins = Plugins()
        self.observer = MlflowObserver(tracking or Tracking(), store)
        self.plugins.register(self.observer, "mlflow", "built in")
        self.run = RunDescription(
            recipe=recipe,
            settings=SETTINGS,
            source="schema: 1  # as typed\n",
            store=store,
            execution={"versions": {"torch": "2.13.0"}, "git": {"commit": "abc", "has_changes": True}, "store": store},
        )

    def tell(self, hook_name: str, **arguments: Any) -> None:
        names = getattr(hookspecs, hook_name).__code__.co_varnames
        getattr(self.plugins.hook, hook_name)(**({"run": self.run} if "run" in names else {}), **arguments)

    def stage(self, name: str, metrics: dict[str, Any], *, reused: bool = False, steps: int = 0) -> None:
        path = self.store / name / "0123"
        path.mkdir(parents=True, exist_ok=True)
        if not reused:
            self.tell("nexus_stage_started", stage=name, key="0123", settings={"tokens": 5})
        for step in range(1, steps + 1):
            self.tell("nexus_metrics", stage=name, step=step, values={"loss": 2.0 - step / steps, "router KL!": 0.1})
        outcome = StageOutcome(name, "0123", path, reused, 1.5, metrics)
        self.tell("nexus_stage_finished", outcome=outcome)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    """A finished run: collect reused, train with 1,200 steps, validate with a report and a picture."""
    folder = tmp_path_factory.mktemp("track")
    here = Path.cwd()
    os.chdir(folder)
    recording = Recording(folder / "runs")
    recording.tell("nexus_run_started")
    recording.stage("collect", {"tokens": 1000, "note": "fine"}, reused=True)
    recording.stage("train", {"loss": 0.75}, steps=1200)
    validate = recording.store / "validate" / "0123"
    validate.mkdir(parents=True)
    (validate / "report.json").write_text("{}")
    (validate / "plots").mkdir()
    (validate / "plots" / "router.png").write_bytes(b"png")
    (validate / "weights.safetensors").write_bytes(b"weights")
    recording.stage("validate", MEASURED)
    recording.tell("nexus_run_finished", status="done", outcomes=[])
    yield recording
    os.chdir(here)


def all_runs(recording: Recording) -> list[Any]:
    client = connect(recording.observer.uri)
    experiment = client.get_experiment_by_name("nexus")
    return list(client.search_runs([experiment.experiment_id]))


def runs_of(recording: Recording) -> dict[str, Any]:
    return {run.info.run_name: run for run in all_runs(recording)}


def test_a_recipe_is_a_parent_run_and_each_stage_a_nested_one(recorded: Recording) -> None:
    runs = runs_of(recorded)
    assert set(runs) == {"tiny", "collect", "train", "validate"}
    parent = runs.pop("tiny")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}


def test_parameters_are_flattened_and_long_values_cut(recorded: Recording) -> None:
    params = runs_of(recorded)["tiny"].data.params
    assert params["data.domain.0.path"] == "math.jsonl"
    assert params["train.schedule.temperature"] == "[4.0, 2.0]"
    assert params["train.losses"] == "{}"
    assert len(params["data.general.0.path"]) == 500


def test_reused_stages_are_tagged_and_keep_their_final_numbers(recorded: Recording) -> None:
    runs = runs_of(recorded)
    assert runs["collect"].data.tags["reused"] == "true"
    assert runs["collect"].data.metrics["tokens"] == 1000
    assert runs["collect"].data.tags["note"] == "fine"
    assert runs["train"].data.tags["reused"] == "false"
    assert json.loads(runs["tiny"].data.tags["nexus.reused"]) == ["collect"]


def test_every_step_is_there_and_the_final_number_is_the_latest(recorded: Recording) -> None:
    train = runs_of(recorded)["train"]
    history = connect(recorded.observer.uri).get_metric_history(train.info.run_id, "loss")
    assert [metric.step for metric in history if metric.value != 0.75] == list(range(1, 1201))
    assert train.data.metrics["loss"] == 0.75
    assert "router KL_" in train.data.metrics


def test_the_parent_holds_the_headline(recorded: Recording) -> None:
    parent = runs_of(recorded)["tiny"]
    assert parent.data.metrics["perplexity/domain/base"] == 10.0
    assert parent.data.metrics["change/domain"] == -0.2
    assert parent.data.metrics["router/l1"] == 0.1
    assert parent.data.metrics["validate/tokens"] == 512
    assert parent.data.metrics["train/loss"] == 0.75
    assert parent.data.metrics["seconds/train"] == 1.5
    assert parent.data.tags["verdict"] == "gained and retained"
    assert json.loads(parent.data.tags["nexus.learnt"]) == ["domain"]
    assert json.loads(parent.data.tags["nexus.kept"]) == ["general"]


def test_versions_and_git_state_are_tags(recorded: Recording) -> None:
    tags = runs_of(recorded)["tiny"].data.tags
    assert tags["versions.torch"] == "2.13.0"
    assert (tags["git.commit"], tags["git.has_changes"], tags["mlflow.source.git.commit"]) == ("abc", "True", "abc")


def test_recipe_reports_and_pictures_are_artifacts_and_weights_are_not(recorded: Recording) -> None:
    client, runs = connect(recorded.observer.uri), runs_of(recorded)
    recipe = {item.path for item in client.list_artifacts(runs["tiny"].info.run_id, "recipe")}
    assert recipe == {"recipe/recipe.yaml", "recipe/resolved.yaml", "recipe/execution.yaml"}
    validate = runs["validate"].info.run_id
    assert {item.path for item in client.list_artifacts(validate)} == {"report.json", "plots"}
    assert [item.path for item in client.list_artifacts(validate, "plots")] == ["plots/router.png"]


def test_nothing_is_written_outside_the_store(recorded: Recording) -> None:
    assert {path.name for path in recorded.store.parent.iterdir()} == {"runs"}
    assert {path.name for path in recorded.store.iterdir()} == {
        "mlflow.db",
        "mlartifacts",
        "train",
        "validate",
        "collect",
    }


def test_a_failed_stage_fails_its_run_and_says_why(recorded: Recording, tmp_path: Path) -> None:
    failing = Recording(recorded.store, recipe="failing")
    failing.tell("nexus_run_started")
    failing.tell("nexus_stage_started", stage="select", key="77", settings={})
    failing.tell("nexus_stage_failed", stage="select", error=ValueError("no experts"))
    failing.tell("nexus_run_finished", status="failed", outcomes=[])
    runs = runs_of(failing)
    assert (runs["failing"].info.status, runs["select"].info.status) == ("FAILED", "FAILED")
    assert runs["failing"].data.tags["error"] == "ValueError: no experts"


def test_a_run_whose_process_is_gone_is_ended_by_the_next_of_its_recipe(recorded: Recording) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    killed = Recording(recorded.store, recipe="killed")
    killed.tell("nexus_run_started")
    killed.tell("nexus_stage_started", stage="merge", key="77", settings={})
    connect(killed.observer.uri).set_tag(killed.observer._parent_id, "nexus.pid", str(gone.pid))
    Recording(recorded.store, recipe="another").tell("nexus_run_started")
    assert runs_of(killed)["merge"].info.status == "RUNNING"
    Recording(recorded.store, recipe="killed").tell("nexus_run_started")
    statuses = {run.info.run_id: run.info.status for run in all_runs(killed)}
    assert statuses[killed.observer._parent_id] == "KILLED"
    assert runs_of(killed)["merge"].info.status == "KILLED"


def test_a_server_that_does_not_answer_costs_one_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nexus_core"):
        unreachable = Recording(tmp_path / "runs", Tracking(uri="http://127.0.0.1:9"))
        unreachable.tell("nexus_run_started")
        unreachable.stage("train", {"loss": 1.0}, steps=3)
        unreachable.tell("nexus_run_finished", status="done", outcomes=[])
    assert [record.levelname for record in caplog.records if record.name.startswith("nexus_core")] == ["WARNING"]
    assert "http://127.0.0.1:9" in caplog.text
    assert "\n" not in caplog.records[-1].getMessage()
    assert not unreachable.observer.is_recording


def test_tracking_switched_off_writes_nothing(tmp_path: Path) -> None:
    off = Recording(tmp_path / "runs", Tracking(enabled=False))
    off.tell("nexus_run_started")
    off.tell("nexus_run_finished", status="done", outcomes=[])
    assert not (tmp_path / "runs").exists()


def test_standard_error_stays_the_runs_own(tmp_path: Path) -> None:
    """MLflow and alembic tell every table they create unless asked not to."""
    script = (
        "from pathlib import Path\n"
        "from nexus_core.track.connection import connect, default_uri\n"
        f"connect(default_uri(Path({str(tmp_path)!r}))).create_experiment('x')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert (result.stdout, result.stderr) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_model_folders_own_files_are_no_reports(tmp_path: Path) -> None:
    for name in (
        "config.json",
        "tokenizer.json",
        "convert_report.json",
        "effect.png",
        "stage.json",
        "model.safetensors",
    ):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in artifacts(tmp_path)] == ["convert_report.json", "effect.png", "stage.json"]


def test_the_default_database_lies_in_the_store(tmp_path: Path) -> None:
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
