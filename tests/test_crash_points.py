"""Work that is ended anywhere on its way to the disk: nothing half-written is read, and the next try ends the same."""

from __future__ import annotations

import json
from pathlib import Path

import fake_pipeline
import pytest
import torch
from crashes import Kind, every_crash
from fake_pipeline import files
from training_runs import write_converted

from nexus_core.checkpoint.writer import remove_partial_files, write_json
from nexus_core.cli.folders import resumable_folder
from nexus_core.distill import stored_routers
from nexus_core.pipeline.disk import atomic_folder
from nexus_core.pipeline.store import Store
from nexus_core.stages import parts, standing
from nexus_core.train.checkpoints import newest_position, write_position
from nexus_core.train.journal import Journal
from nexus_core.train.teacher_store import TeacherStore, find_chunk, write_chunk, write_manifest
from nexus_core.train.trained_model import write_trained_model

KINDS: tuple[Kind, ...] = ("killed", "torn", "failed")
LAST = 3
kinds = pytest.mark.parametrize("kind", KINDS)


def run_pipeline(folder: Path, until: str, rerun: tuple[str, ...] = ()) -> dict[str, dict[str, bytes]]:
    result = fake_pipeline.run(folder, until=until, rerun=rerun)
    return {outcome.name: files(outcome.path) for outcome in result.outcomes}


@pytest.mark.parametrize(
    ("kind", "until", "rerun"),
    [
        ("killed", "train", ()),
        ("torn", "gather", ()),
        ("failed", "gather", ()),
        ("killed", "gather", ("gather",)),
        ("failed", "gather", ("gather",)),
    ],
)
def test_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, until: str, rerun: tuple[str, ...]
) -> None:
    def prepare(folder: Path) -> None:
        fake_pipeline.checkpoint(folder)
        fake_pipeline.recipe(folder)
        if rerun:
            run_pipeline(folder, until)

    monkeypatch.setattr(fake_pipeline, "STEPS", 2)
    (tmp_path / "whole").mkdir()
    undisturbed = run_pipeline(tmp_path / "whole", until)
    crashes = 0
    for folder in every_crash(tmp_path, lambda folder: run_pipeline(folder, until, rerun), kind, prepare):
        crashes += 1
        for stage in undisturbed:
            for record in Store(folder / "runs").records(stage):
                found = files(folder / "runs" / stage / record.key)
                assert found == undisturbed[stage], f"{folder.name}: {stage} is there, but not whole"
        assert run_pipeline(folder, until) == undisturbed, folder.name
        for stage in undisturbed:
            names = [path.name for path in (folder / "runs" / stage).glob("[!.]*")]
            assert len(names) == 1, f"{folder.name}: {names} were left"
    assert crashes > 10


def test_a_folder_that_a_command_writes(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with atomic_folder(folder / "out") as out:
            for name in ("a", "b"):
                write_json(out / f"{name}.json", {"name": name})

    for kind in KINDS:
        for folder in every_crash(tmp_path, write, kind):
            out = folder / "out"
            if out.exists():
                assert sorted(path.name for path in out.iterdir()) == ["a.json", "b.json"], folder.name
            else:
                write(folder)
            assert {name: json.loads((out / f"{name}.json").read_text())["name"] for name in "ab"} == {
                "a": "a",
                "b": "b",
            }


def test_a_folder_that_a_command_goes_on_in(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with resumable_folder(folder / "out", {"settings": 1}) as out:
            for name in ("a", "b"):
                (out / name).mkdir(exist_ok=True)
                if not (out / name / "done.json").exists():
                    write_json(out / name / "done.json", {"name": name})

    expected = {"a/done.json", "b/done.json"}
    for kind in KINDS:
        for folder in every_crash(tmp_path, write, kind):
            if not (folder / "out").exists():
                write(folder)
            assert set(files(folder / "out")) == expected, folder.name
            assert json.loads((folder / "out" / "b" / "done.json").read_text()) == {"name": "b"}


@kinds
def test_a_training_checkpoint(tmp_path: Path, kind: Kind) -> None:
    def state(step: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.full((300,), float(step))}

    def write(folder: Path) -> None:
        before = newest_position(folder / "checkpoints")
        for step in range(before.step + 1 if before else 1, LAST + 1):
            write_position(folder / "best", step, state(step), {}, {"score": step}, keep=1)
            write_position(folder / "checkpoints", step, state(step), state(-step), {"seed": step}, keep=2)

    crashes, found = 0, set()
    for folder in every_crash(tmp_path, write, kind):
        crashes += 1
        for name in ("checkpoints", "best"):
            position = newest_position(folder / name)
            if position is not None:
                assert torch.equal(position.trainables["weight"], state(position.step)["weight"]), folder.name
                found.add(name)
            else:
                # Once there was one, there always is: it goes only when the next is whole.
                assert name not in found, f"{folder.name}: {name} has no checkpoint that can be read"
        write(folder)
        for name, keep in (("checkpoints", 2), ("best", 1)):
            position = newest_position(folder / name)
            assert position is not None
            assert position.step == LAST
            # One that was killed while it removed older ones has one more, until the next is written.
            assert keep <= len(list(folder.glob(f"{name}/step-??????"))) <= keep + 1
    assert crashes > 20


@kinds
def test_the_journal(tmp_path: Path, kind: Kind) -> None:
    rows = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(6)]

    def write(folder: Path) -> None:
        journal = Journal(folder / "metrics.jsonl")
        for step in range(4):
            journal.write(step, {"loss": rows[step]["loss"]})
        # A run that goes on after its checkpoint of step 2 writes the later steps again.
        journal.cut_after(2)
        for step in range(3, 6):
            journal.write(step, {"loss": rows[step]["loss"]})

    for folder in every_crash(tmp_path, write, kind):
        found = Journal(folder / "metrics.jsonl").rows()
        assert found == rows[: len(found)], folder.name


@kinds
def test_a_stored_teacher(tmp_path: Path, kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TLE = torch.randn(5, 2, 4, generator=generator)

    def write(folder: Path) -> None:
        chunks = []
        for first in (0, 1):
            chunk = find_chunk(folder, "domain", first)
            if chunk is None:
                chunk = write_chunk(folder, "domain", first, [], [stored_routers.encode(logits_TLE + first)], {"n": 1})
            chunks.append(chunk)
        write_manifest(folder, {"vocabulary_size": 8}, chunks)

    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    for folder in every_crash(tmp_path, write, kind):
        if (folder / "capture.json").exists():
            assert torch.equal(
                TeacherStore(folder).routers("domain", 1), stored_routers.decode(stored_routers.encode(logits_TLE + 1))
            )
        write(folder)
        remove_partial_files(folder)
        assert files(folder) == expected, folder.name


@kinds
def test_the_sums_of_collect(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "SAVE_EVERY_SECONDS", 0.0)

    class Sum:
        def __init__(self) -> None:
            self.total = torch.zeros(300, dtype=torch.float64)

        def state(self) -> dict[str, torch.Tensor]:
            return {"total": self.total}

        def restore(self, state: dict[str, torch.Tensor]) -> None:
            self.total = state["total"]

    def add(folder: Path) -> torch.Tensor:
        sums = Sum()
        saved = standing.Standing(folder, {"sum": sums}, "identity")
        for batch in range(saved.restore(), 4):
            sums.total = sums.total * 3 + batch
            saved.save_now_and_then(batch + 1)
        return sums.total

    (tmp_path / "whole").mkdir()
    expected = add(tmp_path / "whole")
    for folder in every_crash(tmp_path, add, kind):
        assert torch.equal(add(folder), expected), folder.name


@kinds
def test_parts_of_collect_are_forgotten_at_once(tmp_path: Path, kind: Kind) -> None:
    def prepare(folder: Path) -> None:
        for part in ("1-of-2", "2-of-2"):
            (folder / parts.FOLDER_NAME / part).mkdir(parents=True)
            write_json(folder / parts.FOLDER_NAME / part / parts.DONE_NAME, {"identity": "a", "metrics": {}})
            (folder / parts.FOLDER_NAME / part / "sums").write_text("here")

    for folder in every_crash(tmp_path, parts.forget_parts, kind, prepare):
        for done in folder.glob(f"{parts.FOLDER_NAME}/*/{parts.DONE_NAME}"):
            assert (done.parent / "sums").is_file(), f"{folder.name}: says that it is done, and is not"
        parts.forget_parts(folder)
        assert list(folder.iterdir()) == []


@kinds
def test_a_trained_model(tmp_path: Path, kind: Kind) -> None:
    source = write_converted(tmp_path / "source")
    names = [name for name in source.reader.entries if "shared_expert" in name]
    trained = {name: source.reader.read(name) + 1 for name in names}

    def write(folder: Path) -> None:
        write_trained_model(source, folder / "model", trained, {"changed": True})

    write(tmp_path)
    expected = files(tmp_path / "model")
    for name, prepare in (("first", lambda folder: None), ("again", write)):
        for folder in every_crash(tmp_path / name, write, kind, prepare):
            if kind != "torn" and (folder / "model").exists():
                assert files(folder / "model") == expected, folder.name
            write(folder)
            assert files(folder / "model") == expected, folder.name
