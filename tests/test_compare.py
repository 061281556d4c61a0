"""`nexus compare`: which runs, what is said of them, and how it looks in a terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nexus_core.cli.compare import command
from nexus_core.errors import UsageError
from nexus_core.plugins import Plugins
from nexus_core.recipe.schema import Tracking
from nexus_core.report.comparison import as_json, as_text, compare, differing_settings
from nexus_core.track.observer import MlflowObserver
from nexus_core.track.runs import choose, recorded_runs
from nexus_core.types import RecordedRun, RunDescription, StageOutcome

FROZEN = RecordedRun(
    run_id="aaaa1111bbbb",
    name="tiny",
    status="FINISHED",
    started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    settings={"schema": "1", "train.routing.strategy": "frozen", "run.store": "runs"},
    metrics={
        "perplexity/domain/base": 12.0,
        "perplexity/domain/student": 9.0,
        "change/domain": -0.25,
        "perplexity/general/base": 5.0,
        "perplexity/general/student": 5.05,
        "change/general": 0.01,
        "router/l1": 0.123456,
        "train/loss": 1.5,
        "collect/tokens": 1000,
        "seconds/collect": 3.0,
        "seconds/train": 61.25,
    },
    learnt=("domain",),
    kept=("general",),
    stages=("train", "collect"),
    reused=("collect",),
    verdict="gained and retained",
)
TRAINABLE = replace(
    FROZEN,
    run_id="cccc2222dddd",
    name="tiny_trainable_router",
    settings={"schema": "1", "train.routing.strategy": "trainable", "run.store": "elsewhere", "train.losses.x": "2"},
    metrics={**FROZEN.metrics, "train/loss": 1.4, "train/router_kl": 0.07},
    started=datetime(2026, 1, 2, 5, 4, tzinfo=UTC),
)


def test_settings_that_differ_leave_out_how_a_run_was_executed() -> None:
    assert differing_settings([FROZEN, TRAINABLE]) == {
        "train.routing.strategy": ("frozen", "trainable"),
        "train.losses.x": (None, "2"),
    }


def test_every_number_stands_under_its_title() -> None:
    sections = {
        section.title: {row.label: row.cells for row in section.rows} for section in compare([FROZEN, TRAINABLE])
    }
    assert sections[""]["verdict"] == ("gained and retained", "gained and retained")
    assert sections["gain: perplexity on learnt sets, base -> student"] == {"domain": ("12 -> 9 (-25.0%)",) * 2}
    assert sections["retention: perplexity on all other sets"] == {"general": ("5 -> 5.05 (+1.0%)",) * 2}
    assert sections["router health"] == {"l1": ("0.1235", "0.1235"), "kl while training": ("-", "0.07")}
    assert sections["training, final"] == {"loss": ("1.5", "1.4")}
    assert sections["seconds"] == {"collect": ("3.0 (reused)",) * 2, "train": ("61.2",) * 2}


def test_a_set_that_one_run_learns_and_another_keeps_stands_in_both_places() -> None:
    swapped = replace(FROZEN, learnt=("general",), kept=("domain",))
    sections = {section.title.partition(":")[0]: section.rows for section in compare([FROZEN, swapped])}
    assert [(row.label, row.cells[0] == "-", row.cells[1] == "-") for row in sections["gain"]] == [
        ("domain", False, True),
        ("general", True, False),
    ]


def test_a_narrow_terminal_gets_the_runs_in_blocks() -> None:
    wide, narrow = as_text([FROZEN, TRAINABLE], 160), as_text([FROZEN, TRAINABLE], 60)
    assert wide.count("retention") == 1
    assert narrow.count("retention") == 2
    assert max(len(line) for line in narrow.splitlines()) <= 60
    assert "cccc2222" in narrow.split("\n\n\n")[1]


def test_one_run_is_shown_without_differences() -> None:
    assert "differ" not in as_text([FROZEN], 100)


def test_json_keeps_numbers_and_roles() -> None:
    answer = json.loads(json.dumps(as_json([FROZEN, TRAINABLE])))
    assert answer["runs"][0]["sets"]["domain"] == {"role": "learnt", "base": 12.0, "student": 9.0, "change": -0.25}
    assert answer["runs"][0]["sets"]["general"]["role"] == "kept"
    assert answer["runs"][0]["router"] == {"l1": 0.123456}
    assert answer["runs"][0]["reused"] == ["collect"]
    assert answer["settings_that_differ"]["train.losses.x"] == [None, "2"]


def test_the_newest_finished_run_of_each_recipe_is_chosen_oldest_first() -> None:
    older = replace(FROZEN, run_id="eeee3333", started=datetime(2026, 1, 1, tzinfo=UTC))
    failed = replace(FROZEN, run_id="ffff4444", status="FAILED", started=datetime(2026, 1, 3, tzinfo=UTC))
    runs = [failed, TRAINABLE, FROZEN, older]
    assert choose(runs, ()) == [FROZEN, TRAINABLE]
    assert choose(runs, (), last=3) == [older, FROZEN, TRAINABLE]
    assert choose(runs, ("tiny_trainable_router", "eeee")) == [TRAINABLE, older]
    assert choose(runs, ("ffff4444",)) == [failed]


@pytest.mark.parametrize(
    ("runs", "named", "said"),
    [
        ([FROZEN], ("tinny",), "did you mean 'tiny'"),
        ([FROZEN, replace(FROZEN, run_id="aaaa9999")], ("aaaa",), "ids of 2 runs"),
        ([], (), "nexus run RECIPE"),
        ([replace(FROZEN, status="FAILED")], (), "1 began and did not finish"),
    ],
)
def test_what_cannot_be_chosen_is_said_in_a_sentence(
    runs: list[RecordedRun], named: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        choose(runs, named)


def record(store: Path, recipe: str, routing: str, student_perplexity: float) -> None:
    """One run as the pipeline tells it."""
    plugins = Plugins()
    plugins.register(MlflowObserver(Tracking(), store), "mlflow", "built in")
    settings: dict[str, Any] = {"data": {"domain": [], "general": []}, "train": {"routing": {"strategy": routing}}}
    run = RunDescription(recipe=recipe, settings=settings, source="", store=store)

    def finish(stage: str, metrics: dict[str, Any], *, reused: bool) -> None:
        path = store / stage / routing
        path.mkdir(parents=True, exist_ok=True)
        if not reused:
            plugins.hook.nexus_stage_started(run=run, stage=stage, key=routing, settings={})
        plugins.hook.nexus_stage_finished(run=run, outcome=StageOutcome(stage, routing, path, reused, 2.0, metrics))

    plugins.hook.nexus_run_started(run=run)
    finish("collect", {"tokens": 10}, reused=routing == "trainable")
    finish("train", {"loss": 1.5}, reused=False)
    perplexities = {"perplexity/domain/base": 10.0, "perplexity/domain/student": student_perplexity}
    change = {"change/domain": student_perplexity / 10 - 1, "router/l1": 0.2, "verdict": "gained"}
    finish("validate", perplexities | change, reused=False)
    plugins.hook.nexus_run_finished(run=run, status="done", outcomes=[])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "runs"
    record(folder, "tiny", "frozen", 8.0)
    record(folder, "tiny_trainable_router", "trainable", 7.5)
    return folder


def nexus_compare(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_recorded_runs_are_read_back_newest_first(store: Path) -> None:
    runs = recorded_runs(f"sqlite:///{store}/mlflow.db")
    assert [run.name for run in runs] == ["tiny_trainable_router", "tiny"]
    assert runs[0].metrics["change/domain"] == pytest.approx(-0.25)
    assert (runs[0].learnt, runs[0].kept, runs[0].reused) == (("domain",), ("general",), ("collect",))
    assert runs[0].settings["train.routing.strategy"] == "trainable"


def test_a_table_of_two_recipes(store: Path) -> None:
    result = nexus_compare("--store", str(store))
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["tiny", "tiny_trainable_router"]
    assert ["train.routing.strategy", "frozen", "trainable"] in lines
    assert "10 -> 8 (-20.0%)" in result.stdout
    assert "10 -> 7.5 (-25.0%)" in result.stdout
    assert "2.0 (reused)" in result.stdout


def test_json_is_one_object(store: Path) -> None:
    result = nexus_compare("--store", str(store), "--json", "tiny")
    answer = json.loads(result.stdout)
    assert answer["status"] == "done"
    assert [run["recipe"] for run in answer["runs"]] == ["tiny"]
    assert answer["runs"][0]["seconds"] == {"collect": 2.0, "train": 2.0, "validate": 2.0}


def test_a_store_without_runs_is_refused_and_left_empty(tmp_path: Path) -> None:
    result = nexus_compare("--store", str(tmp_path / "runs"))
    assert isinstance(result.exception, UsageError)
    assert "nexus run RECIPE" in str(result.exception)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_experiment_is_refused_with_the_nearest(store: Path) -> None:
    result = nexus_compare("--store", str(store), "--experiment", "nexsu")
    assert "did you mean 'nexus'" in str(result.exception)


def test_a_server_that_does_not_answer_is_a_sentence() -> None:
    result = nexus_compare("--uri", "http://127.0.0.1:9")
    assert isinstance(result.exception, UsageError)
    assert "127.0.0.1:9" in str(result.exception)


def test_what_cannot_be_opened_as_a_database_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "letter.db").write_text("Dear database")
    for name, reason in (("folder", "Is a directory"), ("letter", "file is not a database")):
        with pytest.raises(UsageError, match=rf"{name}\.db: recorded runs cannot be read: .*{reason}.*; name another"):
            recorded_runs(f"sqlite:///{tmp_path / name}.db")
