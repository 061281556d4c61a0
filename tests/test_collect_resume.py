"""Collecting that is killed goes on to the same bits; collecting in parts adds up to the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from collected_text import write_sets
from gpt_oss_checkpoints import write_tiny_checkpoint
from safetensors.torch import load_file

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.cli import nexus
from nexus_core.errors import ShapeError, StageError, UsageError
from nexus_core.recipe.schema import Collect
from nexus_core.stages import collect as stage
from nexus_core.stages import standing
from nexus_core.stages.collect import collect
from nexus_core.stages.merge_collected import merge_collected
from nexus_core.stages.router_pass import RouterPass
from nexus_core.stages.shards import Shard, read_shard
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.probabilities import ProbabilityWriter
from nexus_core.statistics.saliency import SaliencyFile

SETTINGS = Collect(
    tokens=1_000, sequence_length=32, batch_size=2, keep_inputs=20, keep_probabilities=700, expert_norms=True
)
FILES = ("router_stats.safetensors", "moe_inputs.safetensors", "neuron_saliency.safetensors", "sampling_report.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocabulary=512, tokenizer=True))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(checkpoint, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    collect(checkpoint, sets, SETTINGS, out, dtype=torch.float32)
    return out


def assert_same(out: Path, expected: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


class Disturbance(Exception):
    """Something that ends a pass."""


@pytest.fixture
def interrupted(checkpoint, sets, tmp_path, monkeypatch):
    """A folder in which a pass was saved after every batch and ended after the seventh, in the middle of its eighth."""
    monkeypatch.setattr(standing, "SAVE_EVERY_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        route = RouterPass.route
        routed = []

        def disturbed(self, batch):
            route(self, batch)
            routed.append(batch)
            if len(routed) == 8:
                raise Disturbance

        patch.setattr(RouterPass, "route", disturbed)
        with pytest.raises(Disturbance):
            collect(checkpoint, sets, SETTINGS, tmp_path, dtype=torch.float32)
    return tmp_path


def test_an_interrupted_pass_goes_on_to_the_same_bits(checkpoint, sets, undisturbed, interrupted, monkeypatch, capsys):
    routed = []
    route = RouterPass.route
    monkeypatch.setattr(RouterPass, "route", lambda self, batch: (routed.append(batch), route(self, batch)))
    steps = []
    collect(checkpoint, sets, SETTINGS, interrupted, dtype=torch.float32, report=lambda step, _: steps.append(step))
    assert steps == list(range(7, 16))
    assert len(routed) == 9
    assert_same(interrupted, undisturbed)


@pytest.mark.parametrize("damage", ["cut", "other settings", "no probabilities", "none"])
def test_what_was_saved_is_used_only_if_it_is_whole_and_of_the_same_work(
    checkpoint, sets, undisturbed, interrupted, damage, monkeypatch, caplog
):
    position = json.loads((interrupted / "progress" / "position.json").read_text())
    assert position["batches"] == 7
    (saved,) = (interrupted / "progress").glob("batches-*.safetensors")
    if damage == "cut":
        saved.write_bytes(saved.read_bytes()[:-1] + b"x")
    elif damage == "no probabilities":
        (interrupted / "router_probabilities.npz").unlink()
    settings = SETTINGS.model_copy(update={"seed": 1}) if damage == "other settings" else SETTINGS
    steps = []
    collect(checkpoint, sets, settings, interrupted, dtype=torch.float32, report=lambda step, _: steps.append(step))
    assert steps[0] == (7 if damage == "none" else 0)
    assert ("collect starts again" in caplog.text) == (damage in ("cut", "no probabilities"))
    if damage != "other settings":
        assert_same(interrupted, undisturbed)


def test_a_killed_command_goes_on_when_it_is_typed_again(checkpoint, sets, tmp_path):
    """SIGKILL while batches are routed, wherever that happens to be; then the same command, beside one that lives."""
    program = (
        "import nexus_core.stages.standing as s; s.SAVE_EVERY_SECONDS = 0.0\nfrom nexus_core.cli import main; main()"
    )
    tokens = ["--set", "tokens=2000", "--set", "sequence_length=32", "--set", "batch_size=1", "--expert-norms"]
    data = ["--data", sets["domain"][0].path, *tokens, "--keep-probabilities", "1500"]
    command = ["collect", str(checkpoint.folder), *data, "--dtype", "float32", "--out"]

    killed = subprocess.Popen([sys.executable, "-c", program, *command, str(tmp_path / "killed")])
    position = tmp_path / ".killed.partial" / "progress" / "position.json"
    deadline = time.monotonic() + 120
    while not (position.is_file() and json.loads(position.read_text())["batches"] >= 5):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "lived"):
        nexus.main([*command, str(tmp_path / name)], "nexus", standalone_mode=False)
    assert_same(tmp_path / "killed", tmp_path / "lived")


def test_shards_add_up_to_one_pass(checkpoint, sets, undisturbed, tmp_path):
    shards = [Shard(number, 3) for number in (1, 2, 3)]
    for shard in shards:
        (tmp_path / str(shard.number)).mkdir()
        collect(checkpoint, sets, SETTINGS, tmp_path / str(shard.number), dtype=torch.float32, shard=shard)
    (tmp_path / "merged").mkdir()
    metrics = merge_collected([tmp_path / name for name in "312"], tmp_path / "merged")
    assert metrics["tokens"] == 1_000
    one, about = RouterStatistics.load(undisturbed)
    other, merged_about = RouterStatistics.load(tmp_path / "merged")
    assert merged_about == about
    for name, sums in one.state().items():
        torch.testing.assert_close(other.state()[name], sums, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.covariance(), one.covariance(), rtol=1e-9, atol=1e-12)
    kept, merged_kept = (load_file(folder / FILES[1]) for folder in (undisturbed, tmp_path / "merged"))
    assert all(torch.equal(kept[name], merged_kept[name]) for name in kept)
    saliency, merged = (SaliencyFile(folder / FILES[2]).load() for folder in (undisturbed, tmp_path / "merged"))
    assert merged.sets == saliency.sets
    for name, sums in saliency.state().items():
        torch.testing.assert_close(merged.state()[name], sums, rtol=1e-9, atol=1e-9)
    # The first 700 tokens lie in the first two or three parts, wherever these end.
    parts = [tmp_path / name / "router_probabilities.npz" for name in "123"]
    stored = np.concatenate([np.load(path)["probabilities"] for path in parts if path.is_file()])
    assert np.array_equal(stored, np.load(undisturbed / "router_probabilities.npz")["probabilities"])


def test_folders_that_do_not_belong_together_are_refused(checkpoint, sets, undisturbed, tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        collect(checkpoint, sets, SETTINGS, tmp_path / str(number), dtype=torch.float32, shard=Shard(number, 3))
    with pytest.raises(UsageError, match="the shards 1/3, 2/3 are not those of one pass, each once; give all 3"):
        merge_collected([tmp_path / "1", tmp_path / "2"], tmp_path)
    with pytest.raises(UsageError, match="some are whole"):
        merge_collected([tmp_path / "1", undisturbed], tmp_path)
    with pytest.raises(UsageError, match="at least two"):
        merge_collected([undisturbed], tmp_path)
    statistics, about = RouterStatistics.load(undisturbed)
    (tmp_path / "other").mkdir()
    statistics.save(tmp_path / "other" / FILES[0], {**about, "family": "another"})
    with pytest.raises(UsageError, match=r"other: is of another model than .* \(family another, not gpt_oss\)"):
        merge_collected([undisturbed, tmp_path / "other"], tmp_path)
    with pytest.raises(UsageError, match="there are only 16 batches; take fewer shards"):
        collect(checkpoint, sets, SETTINGS, tmp_path, dtype=torch.float32, shard=Shard(1, 99))


def test_commands_for_parts(checkpoint, sets, tmp_path, capsys):
    flags = ["--tokens", "400", "--set", "sequence_length=32", "--set", "batch_size=4", "--json"]
    for number in "12":
        command = ["collect", str(checkpoint.folder), "--data", sets["domain"][0].path, *flags]
        nexus.main(
            [*command, "--shard", f"{number}/2", "--out", str(tmp_path / number)], "nexus", standalone_mode=False
        )
    parts = ["--merge", str(tmp_path / "1"), "--merge", str(tmp_path / "2")]
    nexus.main(["collect", *parts, "--out", str(tmp_path / "all")], "nexus", standalone_mode=False)
    assert "next        nexus select" in capsys.readouterr().out
    assert RouterStatistics.load(tmp_path / "all")[0].tokens == 400
    for wrong in (["x", *parts], ["--data", "x"], ["x"]):
        with pytest.raises(UsageError, match=r"leave out the model|name a model"):
            nexus.main(["collect", *wrong, "--out", str(tmp_path / "no")], "nexus", standalone_mode=False)
    for text in ("2/1", "0/2", "a", "1"):
        with pytest.raises(UsageError, match="write NUMBER/COUNT"):
            read_shard(text)


def test_probabilities_are_written_as_they_come_and_go_on_where_the_file_stands(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(size, 8, generator=generator) for _ in range(3)] for size in (5, 7, 9)]

    def writer(name: str) -> ProbabilityWriter:
        return ProbabilityWriter(tmp_path / name, 18, (1, 4, 6), 8)

    with writer("whole.npz") as file:
        for batch in batches:
            file.write(batch)
    expected = torch.cat([torch.stack(batch, 1).softmax(-1) for batch in batches])[:18].half().numpy()
    with np.load(tmp_path / "whole.npz") as stored:
        assert stored["layers"].tolist() == [1, 4, 6]
        assert np.array_equal(stored["probabilities"], expected)
    cut = writer("cut.npz").__enter__()
    cut.write(batches[0])
    state = cut.state()
    cut.write(batches[1])
    cut.__exit__(Disturbance, None, None)
    again = writer("cut.npz")
    again.restore(state)
    with again:
        again.write(batches[1])
        again.write(batches[2])
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(b"too short")
    with pytest.raises(ShapeError, match="is shorter than the 5 tokens"):
        writer("cut.npz").restore(state)
    with pytest.raises(ShapeError, match="5 of 18 tokens were written"), writer("few.npz") as file:
        file.write(batches[0])


def test_the_stage_says_that_it_resumes_and_a_failure_leaves_what_was_saved(checkpoint, sets, interrupted, monkeypatch):
    assert stage.STAGE.resumes

    def fails(self, batch):
        raise StageError("no")

    monkeypatch.setattr(RouterPass, "route", fails)
    with pytest.raises(StageError):
        collect(checkpoint, sets, SETTINGS, interrupted, dtype=torch.float32)
    assert json.loads((interrupted / "progress" / "position.json").read_text())["batches"] == 7
