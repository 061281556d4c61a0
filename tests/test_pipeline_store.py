"""The store: outputs are whole or not there, locks die with their owner, folders appear at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nexus_core.errors import StageError, UsageError
from nexus_core.pipeline.disk import is_disk_full
from nexus_core.pipeline.keys import Ingredients
from nexus_core.pipeline.locks import exclusive, owner_of
from nexus_core.pipeline.store import Store, atomic_folder, read_record

MADE_OF = Ingredients("select", 1, {"top_k": 4})


def fill(store: Store, text: str) -> Path:
    with store.writing("select", MADE_OF.key, print):
        partial = store.partial("select", MADE_OF.key, resumes=False)
        (partial / "answer.txt").write_text(text)
        store.finish(
            MADE_OF, seconds=1.0, metrics={"n": 1}, created="2025-01-01T00:00:00+00:00", versions={}, backends={}
        )
    return store.place("select", MADE_OF.key)


def test_an_output_is_found_once_it_is_finished(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert store.find("select", MADE_OF.key) is None
    assert store.records("select") == []
    assert not store.root.exists(), "looking writes nothing"
    place = fill(store, "one")
    record = store.find("select", MADE_OF.key)
    assert record is not None
    assert (record.key, record.settings, record.metrics) == (MADE_OF.key, {"top_k": 4}, {"n": 1})
    assert [path.name for path in place.parent.iterdir()] == [MADE_OF.key]


@pytest.mark.parametrize("content", [None, "", '{"name": "select"', '{"name": "select"}', "[]"])
def test_a_folder_without_a_whole_stage_json_is_not_there(tmp_path: Path, content: str | None) -> None:
    store = Store(tmp_path)
    place = fill(store, "one")
    (place / "stage.json").unlink()
    if content is not None:
        (place / "stage.json").write_text(content)
    assert store.find("select", MADE_OF.key) is None
    assert (fill(store, "two") / "answer.txt").read_text() == "two"
    assert read_record(place) is not None


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    place = fill(store, "one")
    place.rename(place.with_name(f".{MADE_OF.key}.old"))
    with store.writing("select", MADE_OF.key, print):
        assert store.find("select", MADE_OF.key) is not None
    assert (place / "answer.txt").read_text() == "one"


def test_metrics_of_numpy_and_beyond_numbers_are_recorded(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    store = Store(tmp_path)
    with store.writing("select", MADE_OF.key, print):
        store.partial("select", MADE_OF.key, resumes=False)
        metrics = {"a": numpy.float32(0.5), "b": float("nan"), "c": "text"}
        store.finish(MADE_OF, seconds=1.0, metrics=metrics, created="", versions={}, backends={})
    record = store.find("select", MADE_OF.key)
    assert record is not None
    assert record.metrics == {"a": 0.5, "b": "nan", "c": "text"}


def test_a_lock_keeps_others_out_and_says_who_holds_it(tmp_path: Path) -> None:
    lock, order, told = tmp_path / "lock", [], []

    def second() -> None:
        with exclusive(lock, told.append):
            order.append("second")

    with exclusive(lock, told.append):
        thread = threading.Thread(target=second)
        thread.start()
        while not told:
            time.sleep(0.01)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert told[0].startswith(f"process {os.getpid()} on ")
    assert not lock.exists()


def test_a_dead_owners_lock_holds_nobody_up(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        "import sys, time, pathlib; from nexus_core.pipeline.locks import exclusive\n"
        f"with exclusive(pathlib.Path({str(lock)!r}), print):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert owner_of(lock).startswith(f"process {process.pid} on ")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock.exists(), "the file stays, the lock does not"
    told: list[str] = []
    with exclusive(lock, told.append):
        pass
    assert told == []


def test_a_forked_worker_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        "import os, time, pathlib; from nexus_core.pipeline.locks import exclusive\n"
        f"with exclusive(pathlib.Path({str(lock)!r}), print):\n"
        "    child = os.fork()\n"
        # The child says that it runs: what closes the lock in it has run by then.
        "    if child == 0:\n        print(os.getpid(), flush=True); time.sleep(60); os._exit(0)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        told: list[str] = []
        with exclusive(lock, told.append):
            pass
        assert told == []
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_atomic_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        assert folder.parent == out.parent
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


def write_and_fail(out: Path, error: BaseException) -> None:
    with atomic_folder(out) as folder:
        (folder / "file").write_text("x")
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_atomic_folder_vanishes_on_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_and_fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    with pytest.raises(UsageError, match=r"--out .*empty: the folder is not empty"), atomic_folder(tmp_path / "empty"):
        pass
    with (
        pytest.raises(UsageError, match=r"--out .*file: is a file"),
        atomic_folder(tmp_path / "empty" / "file"),
    ):
        pass


@pytest.mark.parametrize("place", ["file/out", "file/deep/out"])
def test_atomic_folder_below_a_file_is_one_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file.*: cannot be written: "), atomic_folder(tmp_path / place):
        pass


def test_atomic_folder_on_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the disk is full; free some space, or give --out"):
        write_and_fail(tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_a_full_disk_is_seen_behind_other_errors() -> None:
    full = OSError(errno.EDQUOT, "quota")
    outer = RuntimeError("writer failed")
    outer.__cause__ = full
    assert is_disk_full(outer)
    assert not is_disk_full(RuntimeError("writer failed"))


def test_stage_json_is_readable_by_people(tmp_path: Path) -> None:
    text = (fill(Store(tmp_path), "one") / "stage.json").read_text()
    assert json.loads(text)["name"] == "select"
    assert text.startswith('{\n  "name": "select",\n  "key"')
