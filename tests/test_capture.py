"""A teacher captured once and trained from: it says what the running one says, and no other run's is taken for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gpt_oss_checkpoints import write_tiny_checkpoint
from training_runs import train_settings, write_converted, write_texts

import nexus_core
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.cli.capture import command as capture_command
from nexus_core.data.mixture import TrainingBatches
from nexus_core.distill import signals, stored_logits
from nexus_core.distill.divergence import LOG_NOTHING
from nexus_core.errors import DataError, UsageError
from nexus_core.recipe.schema import Recipe
from nexus_core.recipe.training import Train
from nexus_core.stages import capture as stage
from nexus_core.stages.capture import STAGE, capture, identity_of
from nexus_core.stages.train import STAGE as TRAIN_STAGE
from nexus_core.stages.train import train
from nexus_core.stages.training_text import shares_of, training_sequences
from nexus_core.statistics.listening import listen
from nexus_core.train import teacher_store
from nexus_core.train.passes import MicroBatch, OnlineTeacher, output_head
from nexus_core.train.stored_teacher import OfflineTeacher
from nexus_core.train.teacher_store import TeacherStore

LEARNT = ["domain"]


# A random model's distributions are flat: to be known well, most of their 320 ids must be stored.
TEACHER = {"kind": "offline", "top_logits": 255, "tail": 0.0, "bytes_per_token": 500.0}


def offline(**changes: Any) -> Train:
    return train_settings(**{"teacher": TEACHER, "gradient_accumulation": 1} | changes)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_converted(tmp_path_factory.mktemp("model"), start="full")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def captured(converted, sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    capture(converted, sets, offline(), LEARNT, folder)
    return folder


def test_it_says_what_the_running_teacher_says(converted, sets, captured) -> None:
    settings = offline()
    sequences = training_sequences(converted.folder, sets, settings)
    batches = TrainingBatches(sequences, shares_of(sets, settings), 3, 0)
    model = nexus_core.load(converted, dtype=torch.float32)
    needs = {signals.TEACHER, signals.TEACHER_ROUTER_LOGITS}
    with torch.no_grad(), listen(model, converted.family) as listener:
        online = OnlineTeacher(model, listener, output_head(model))
        stored = OfflineTeacher(TeacherStore(captured), LEARNT, "cpu")
        for number in range(3):
            micro_batch = MicroBatch.of(batches.batch(number), LEARNT, "cpu", isolates=True)
            expected, found = online.teach(micro_batch, needs), stored.teach(micro_batch, needs)
            assert len(found.teacher) == len(expected.teacher) == len(micro_batch.kept)
            whole = expected.teacher.head.logits(expected.teacher.hidden).log_softmax(-1)
            for token in range(len(whole)):
                is_kept = found.teacher.log_probabilities[token] > LOG_NOTHING
                ids, logs = found.teacher.ids[token][is_kept], found.teacher.log_probabilities[token][is_kept]
                torch.testing.assert_close(logs.exp(), whole[token][ids].exp(), rtol=0.1, atol=1e-3)
            for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
                torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=0.05, atol=1e-4)


def test_training_from_it_ends_as_training_beside_the_teacher_does(converted, sets, captured, tmp_path) -> None:
    found = {}
    for kind in ("online", "offline"):
        out = tmp_path / kind
        out.mkdir()
        settings = offline(teacher=TEACHER | {"kind": kind}, evaluate={"every": 4, "sequences": 4})
        train(converted, sets, settings, LEARNT, out, teacher=captured if kind == "offline" else None)
        found[kind] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(found["offline"], found["online"], strict=True):
        assert ours["lm"] == pytest.approx(theirs["lm"], rel=1e-3)
        assert ours["logits_kl"] == pytest.approx(theirs["logits_kl"], rel=0.1, abs=1e-3)
        assert ours["router_kl"] == pytest.approx(theirs["router_kl"], rel=0.1, abs=1e-3)
    for name in ("held_out/domain", "held_out/general"):
        assert found["offline"][-1][name] == pytest.approx(found["online"][-1][name], rel=0.005)


def test_no_teacher_pass_is_run(converted, sets, captured, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(OnlineTeacher, "teach", lambda *_: pytest.fail("the teacher was run"))
    train(converted, sets, offline(max_steps=2, batch_size=4), LEARNT, tmp_path, teacher=captured)


def test_an_interrupted_capture_goes_on_to_the_same_bytes(converted, sets, captured, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(teacher_store, "CHUNK_TOKENS", 48)  # two sequences a chunk
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    capture(converted, sets, offline(), LEARNT, whole)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    paths = [str(converted.folder), *(source[0].path for source in sets.values()), str(broken)]
    killed = subprocess.run([sys.executable, __file__, *paths], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    done = sorted((broken / "chunks").glob("*.json"))
    assert 0 < len(done) < len(list((whole / "chunks").glob("*.json")))
    with pytest.raises(DataError, match=r"is no stored teacher"):
        TeacherStore(broken)
    times = {path: path.stat().st_mtime_ns for path in done}
    capture(converted, sets, offline(), LEARNT, broken)
    assert {path: path.stat().st_mtime_ns for path in done} == times
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert names == {path.relative_to(broken) for path in broken.rglob("*") if path.is_file()}
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in names)


def test_another_runs_teacher_is_refused_with_the_reason(converted, sets, captured, tmp_path) -> None:
    def refused(match: str, checkpoint: Checkpoint = converted, given: Any = sets, **changes: Any) -> None:
        with pytest.raises(UsageError, match=match):
            train(checkpoint, given, offline(**changes), LEARNT, tmp_path, teacher=captured)

    refused(r"saw other text than the data set 'domain'.*sequence length", sequence_length=16)
    refused(r"saw other text than the data set 'domain'", max_steps=40)
    refused(r"saw other text", given=write_texts(tmp_path, records=50))
    (tmp_path / "other").mkdir()
    other = open_checkpoint(write_tiny_checkpoint(tmp_path / "other" / "base", vocabulary=320, tokenizer=True, seed=9))
    with pytest.raises(UsageError, match=r"is another model's"):
        TeacherStore(captured).refuse_unless_of({}, frozenset(), identity_of(other), "", False)
    with pytest.raises(UsageError, match=r"has another tokenizer"):
        TeacherStore(captured).refuse_unless_of({}, frozenset(), identity_of(converted), "another", False)
    with pytest.raises(UsageError, match=r"no stored teacher was given"):
        train(converted, sets, offline(), LEARNT, tmp_path)
    with pytest.raises(UsageError, match=r"captured with the data set 'general' to be kept"):
        train(converted, sets, offline(), ["domain", "general"], tmp_path, teacher=captured)


def test_base_and_converted_are_the_same_teacher(converted) -> None:
    assert identity_of(open_checkpoint(converted.folder.parent / "base")) == identity_of(converted)


def test_a_damaged_chunk_is_refused(converted, sets, captured, tmp_path) -> None:
    settings, folder = offline(), tmp_path / "damaged"
    folder.mkdir()
    capture(converted, sets, settings, LEARNT, folder)
    chunk = next((folder / "chunks").glob("general-*.safetensors"))
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"general-00000000.safetensors: is damaged"):
        train(converted, sets, settings, LEARNT, tmp_path, teacher=folder)


def _first_ids(folder: Path) -> list[int]:
    store = TeacherStore(folder)
    teacher = stored_logits.decode([store.logits("general", 0)], store.vocabulary_size)
    return teacher.ids[0].tolist()


def test_several_processes_read_the_same_store(captured) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_first_ids, [captured] * 2))
    assert found == [_first_ids(captured)] * 2


def test_another_model_of_the_same_vocabulary_can_teach(converted, sets, tmp_path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", vocabulary=320, tokenizer=True, layers=3, seed=5)
    teacher = {"kind": "offline", "path": str(other)}
    settings = offline(teacher=teacher, losses={"lm": 1.0, "logits_kl": 4.0})
    folder, out = tmp_path / "teacher", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    metrics = capture(converted, sets, settings, LEARNT, folder)
    assert "text_tokens" not in metrics  # its routers are not the student's
    train(converted, sets, settings, LEARNT, out, teacher=folder)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["logits_kl"] > 0.1
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"has another vocabulary than"):
        capture(converted, sets, settings, LEARNT, folder)


def test_only_what_it_depends_on_is_in_its_key_and_only_offline_recipes_have_the_stage() -> None:
    def recipe(**changes: Any) -> Recipe:
        train = {"data": {"domain": 1.0, "general": 1.0}, "teacher": {"kind": "offline"}} | changes
        sources = {"domain": [{"path": "a.txt"}], "general": [{"path": "b.txt"}]}
        return Recipe.model_validate({"schema": 1, "model": {"path": "somewhere"}, "data": sources, "train": train})

    settings = STAGE.settings(recipe())
    for changes in (
        {"losses": {"lm": 2.0}},
        {"learning_rate": 0.5},
        {"routing": {"strategy": "trainable"}},
        {"evaluate": {"every": 5}},
        {"batch_size": 2, "gradient_accumulation": 2},
    ):
        assert STAGE.settings(recipe(**changes)) == settings
    for changes in ({"max_steps": 7}, {"sequence_length": 64}, {"seed": 1}, {"learn": ["general"]},
                    {"teacher": {"kind": "offline", "top_logits": 9}}):  # fmt: skip
        assert STAGE.settings(recipe(**changes)) != settings
    assert STAGE.wanted(recipe())
    assert not STAGE.wanted(recipe(teacher={"kind": "online"}))
    # What capture depends on reaches train through capture's key.
    tops = [recipe(teacher={"kind": "offline", "top_logits": top}) for top in (9, 10)]
    assert TRAIN_STAGE.settings(tops[0]) == TRAIN_STAGE.settings(tops[1])
    assert "capture" in TRAIN_STAGE.inputs


def test_the_command_stores_a_teacher_and_says_how_well(converted, sets, tmp_path) -> None:
    arguments = [str(converted.folder), "--learn", f"domain={sets['domain'][0].path}"]
    arguments += ["--keep", f"general={sets['general'][0].path}", "--steps", "3", "--set", "sequence_length=24"]
    result = CliRunner().invoke(capture_command, [*arguments, "--out", str(tmp_path / "teacher")])
    assert result.exit_code == 0, result.output
    assert "KL to the teacher" in result.output
    assert TeacherStore(tmp_path / "teacher").manifest["sets"]["general"]["kept"] is True


if __name__ == "__main__":
    from nexus_core.recipe.schema import Source

    teacher_store.CHUNK_TOKENS = 48
    write = stage.write_chunk

    def write_some(folder: Path, set_name: str, *rest: Any) -> Any:
        if set_name == "general":
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, set_name, *rest)

    stage.write_chunk = write_some
    texts = {name: [Source(path=sys.argv[i], held_out=0.3)] for i, name in ((2, "domain"), (3, "general"))}
    place = Path(sys.argv[4])
    place.mkdir()
    capture(open_checkpoint(sys.argv[1]), texts, offline(), LEARNT, place)
