"""Runs: what is reused, what is told, and what a kill, a second process or a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_pipeline
import pytest
from fake_pipeline import files, run
from waiting import wait_for

from nexus_core import plugins
from nexus_core.errors import StageError, UsageError
from nexus_core.hookspecs import hookimpl
from nexus_core.pipeline.failures import Interrupted, explained
from nexus_core.pipeline.order import all_stages

SCRIPT = Path(fake_pipeline.__file__)
HALF_WAY = fake_pipeline.STEPS // 2


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that runs the fake pipeline, half-way through training until there is a file `gate`."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(folder / "gate")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_half_way(folder: Path) -> bool:
    states = list(folder.glob("runs/train/.*.partial/state.json"))
    return any(json.loads(state.read_text())[0] == HALF_WAY for state in states)


def test_stages_run_once_and_are_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    first = run(tmp_path, seen=seen)
    assert seen == ["gather", "convert", "train"]
    assert [outcome.reused for outcome in first.outcomes] == [False] * 3
    second = run(tmp_path, seen=seen)
    assert seen == ["gather", "convert", "train"]
    assert [outcome.reused for outcome in second.outcomes] == [True] * 3
    assert [o.metrics for o in first.outcomes] == [o.metrics for o in second.outcomes]
    assert f"train     reused        {first.outcomes[-1].path}" in capsys.readouterr().err


def test_stage_json_says_what_an_output_was_made_from(tmp_path: Path) -> None:
    outcome = run(tmp_path).outcomes[1]
    record = json.loads((outcome.path / "stage.json").read_text())
    assert record["name"] == "convert"
    assert record["key"] == outcome.key == outcome.path.name
    assert record["version"] == 1
    assert set(record["inputs"]) == {"gather"}
    assert record["metrics"] == {"start": 2}
    assert {"nexus", "torch", "transformers"} <= set(record["versions"])
    assert record["seconds"] >= 0
    assert record["created"]


def test_latest_points_at_what_the_recipe_used_last(tmp_path: Path) -> None:
    first = run(tmp_path).outcomes[-1]
    link = tmp_path / "runs" / "latest" / "fake" / "train"
    assert link.resolve() == first.path.resolve()
    assert not link.readlink().is_absolute()
    second = run(tmp_path, changes={"train__seed": 7}).outcomes[-1]
    assert link.resolve() == second.path.resolve() != first.path.resolve()
    run(tmp_path)
    assert link.resolve() == first.path.resolve()


def test_a_changed_setting_runs_its_stage_and_what_reads_it(tmp_path: Path) -> None:
    run(tmp_path)
    outcomes = run(tmp_path, changes={"convert__seed": 1}).outcomes
    assert [(o.name, o.reused) for o in outcomes] == [("gather", True), ("convert", False), ("train", False)]


def test_until_stops_after_the_stage_and_leaves_out_what_it_does_not_need(tmp_path: Path) -> None:
    assert [outcome.name for outcome in run(tmp_path, until="convert").outcomes] == ["gather", "convert"]
    with pytest.raises(UsageError, match=r"--until trian: .*did you mean 'train'"):
        run(tmp_path, until="trian")


def test_rerun_runs_the_stage_and_what_reads_it_again(tmp_path: Path) -> None:
    before = run(tmp_path)
    seen: list[str] = []
    after = run(tmp_path, rerun=("convert",), seen=seen)
    assert seen == ["convert", "train"]
    assert [outcome.key for outcome in after.outcomes] == [outcome.key for outcome in before.outcomes]
    assert {path.name for path in (tmp_path / "runs" / "convert").iterdir()} == {after.outcomes[1].key}
    with pytest.raises(UsageError, match="--rerun nothing"):
        run(tmp_path, rerun=("nothing",))


def test_a_failed_rerun_keeps_the_earlier_output(tmp_path: Path) -> None:
    before = files(run(tmp_path).outcomes[-1].path)

    def fail(step: int) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(tmp_path, rerun=("train",), during_train=fail)
    assert files(run(tmp_path).outcomes[-1].path) == before


def test_killed_in_mid_stage_and_run_again_gives_the_same(tmp_path: Path) -> None:
    undisturbed_folder, folder = tmp_path / "a", tmp_path / "b"
    undisturbed_folder.mkdir()
    folder.mkdir()
    undisturbed = run(undisturbed_folder)
    process = start(folder)
    wait_for(lambda: is_half_way(folder))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(folder.glob("runs/train/*[0-9a-f]/stage.json"))

    steps: list[int] = []
    resumed = run(folder, during_train=steps.append)
    assert steps == list(range(HALF_WAY, fake_pipeline.STEPS)), "train goes on where it was killed"
    assert resumed.outcomes[-1].metrics == undisturbed.outcomes[-1].metrics
    assert files(resumed.outcomes[-1].path) == files(undisturbed.outcomes[-1].path)
    left = [path.name for path in (folder / "runs" / "train").iterdir()]
    assert left == [resumed.outcomes[-1].key], "neither lock nor partial folder stays"


def test_of_two_runs_at_once_one_waits_and_reuses(tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_for(lambda: is_half_way(tmp_path))
    second = start(tmp_path)
    assert second.stderr is not None
    said = iter(second.stderr.readline, "")
    assert any(f"waits for process {first.pid} on " in line for line in said)
    (tmp_path / "gate").touch()
    first_out, first_err = first.communicate(timeout=60)
    second_out, _ = second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, first_err
    assert json.loads(first_out) == {"gather": False, "convert": False, "train": False}
    assert json.loads(second_out) == {"gather": True, "convert": True, "train": True}


def test_a_stage_that_does_not_resume_starts_from_an_empty_folder(tmp_path: Path) -> None:
    plan = fake_pipeline.plan(tmp_path)
    partial = tmp_path / "runs" / "gather" / f".{plan.steps[0].key}.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("of a killed run")
    assert "half" not in files(run(tmp_path).outcomes[0].path)


def test_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted in train; finished stages are kept") as caught:
        run(tmp_path, during_train=interrupt)
    assert caught.value.exit_code == 130
    steps: list[int] = []
    run(tmp_path, during_train=steps.append)
    assert steps[0] == 3


@pytest.mark.parametrize("of_a_library", [False, True])
def test_full_disk_is_one_sentence_and_keeps_partial_work(tmp_path: Path, of_a_library: bool) -> None:
    def fill(step: int) -> None:
        if step == 5:
            if of_a_library:
                raise RuntimeError("I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    with pytest.raises(StageError, match=r"runs: the disk is full; free some space"):
        run(tmp_path, during_train=fill)
    steps: list[int] = []
    run(tmp_path, during_train=steps.append)
    assert steps[0] == 5


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_one_sentence(error: Exception, tmp_path: Path) -> None:
    def exhaust(step: int) -> None:
        raise error

    with pytest.raises(StageError, match=r"train: out of memory on cpu; lower its batch_size.*gradient_checkpointing"):
        run(tmp_path, during_train=exhaust)


def test_out_of_memory_advises_only_what_its_stage_has() -> None:
    collect = next(stage for stage in all_stages() if stage.name == "collect")
    said = str(explained(MemoryError(), collect, "cuda"))
    assert said == "collect: out of memory on cuda; lower its batch_size or sequence_length"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_store_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(UsageError, match=r"runs: cannot be written: Permission denied"):
        run(tmp_path)


def test_store_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match=r"runs: cannot be written"):
        run(tmp_path)


class Recorder:
    """Writes down what a run tells observers."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    @hookimpl
    def nexus_run_started(self, run: Any) -> None:
        self.told.append(("run started", run.recipe))
        assert run.settings["schema"] == 1
        assert run.execution["device"] == "cpu"

    @hookimpl
    def nexus_stage_started(self, stage: str, key: str) -> None:
        self.told.append(("started", stage))

    @hookimpl
    def nexus_metrics(self, stage: str, step: int, values: Any) -> None:
        self.told.append(("metrics", stage, step))

    @hookimpl
    def nexus_stage_finished(self, outcome: Any) -> None:
        self.told.append(("finished", outcome.name, outcome.reused))

    @hookimpl
    def nexus_stage_failed(self, stage: str, error: BaseException) -> None:
        self.told.append(("failed", stage, str(error)))

    @hookimpl
    def nexus_run_finished(self, status: str, outcomes: Any) -> None:
        self.told.append(("run finished", status, len(outcomes)))


class Failing:
    """An observer that always fails."""

    @hookimpl
    def nexus_run_started(self) -> None:
        raise ConnectionError("no server")

    @hookimpl
    def nexus_metrics(self) -> None:
        raise ConnectionError("no server")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    observer = Recorder()
    plugins.installed().register(observer, "recorder", "test")
    yield observer
    plugins.installed().unregister("recorder")


def test_observers_are_told_of_everything_in_order(tmp_path: Path, recorder: Recorder) -> None:
    run(tmp_path)
    told = [item for item in recorder.told if item[0] != "metrics"]
    assert told == [
        ("run started", "fake"),
        *[event for name in ("gather", "convert", "train") for event in (("started", name), ("finished", name, False))],
        ("run finished", "done", 3),
    ]
    assert [item[2] for item in recorder.told if item[0] == "metrics"] == list(range(1, fake_pipeline.STEPS + 1))
    recorder.told.clear()
    run(tmp_path)
    assert ("started", "train") not in recorder.told
    assert ("finished", "train", True) in recorder.told


def test_observers_are_told_of_a_failure(tmp_path: Path, recorder: Recorder) -> None:
    def fail(step: int) -> None:
        raise StageError("loss is nan")

    with pytest.raises(StageError):
        run(tmp_path, during_train=fail)
    assert recorder.told[-2:] == [("failed", "train", "loss is nan"), ("run finished", "failed", 2)]


def test_a_failing_observer_costs_a_warning_per_hook_and_silences_no_other(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    plugins.installed().register(Failing(), "failing", "test")
    try:
        with caplog.at_level(logging.WARNING):
            run(tmp_path)
    finally:
        plugins.installed().unregister("failing")
    assert ("run finished", "done", 3) in recorder.told
    assert len([item for item in recorder.told if item[0] == "metrics"]) == fake_pipeline.STEPS
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert "plugin 'failing' failed in nexus_run_started" in warned[0]
