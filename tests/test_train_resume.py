"""An interrupted training goes on and ends with the same bits as an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import RandomBatches, train_settings, write_converted

import nexus_core
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.stages.train import training_objective
from nexus_core.train.checkpoints import newest_position, write_position
from nexus_core.train.journal import Journal
from nexus_core.train.loop import fit

STEPS = 7
TIMES = {"seconds", "tokens_per_second", "peak_memory_gb"}


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_converted(tmp_path_factory.mktemp("model"))


def run(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, stop: Any = lambda step, values: None) -> None:
    settings = train_settings(
        max_steps=STEPS, checkpoint_every=2, routing={"strategy": "trainable"}, weight_decay=0.01, batch_size=1
    )
    model = nexus_core.load(checkpoint, dtype=dtype)
    batches = RandomBatches(settings.batch_size)
    fit(model, checkpoint.family, batches, settings, training_objective(settings), ["domain"], folder, report=stop)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The last checkpoint's tensors, and the journal without times."""
    last = folder / "checkpoints" / f"step-{STEPS:06d}"
    tensors = load_file(last / "trainables.safetensors") | load_file(last / "optimizer.safetensors")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tensors, [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def assert_same(first: Path, second: Path) -> None:
    (tensors, rows), (other_tensors, other_rows) = outcome(first), outcome(second)
    assert set(tensors) == set(other_tensors)
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())
    assert rows == other_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crash_at", [1, 5, STEPS])
def test_a_crashed_run_ends_like_an_undisturbed_one(converted, tmp_path, dtype, crash_at) -> None:
    def crash(step: int, values: object) -> None:
        if step == crash_at:
            raise Crash

    run(converted, tmp_path / "whole", dtype)
    with pytest.raises(Crash):
        run(converted, tmp_path / "broken", dtype, crash)
    run(converted, tmp_path / "broken", dtype)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_killed_process_goes_on_to_the_same_bits(converted, tmp_path) -> None:
    run(converted, tmp_path / "whole", torch.float32)
    command = [sys.executable, __file__, str(converted.folder), str(tmp_path / "broken")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert Journal(tmp_path / "broken" / "metrics.jsonl").rows()[-1]["step"] == 5
    run(converted, tmp_path / "broken", torch.float32)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_finished_run_has_nothing_left_to_do(converted, tmp_path) -> None:
    run(converted, tmp_path, torch.float32)
    steps = []
    run(converted, tmp_path, torch.float32, lambda step, values: steps.append(step))
    assert steps == []


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path) -> None:
    for step in (2, 4):
        write_position(tmp_path, step, {"weight": torch.full((3,), float(step))}, {}, {}, keep=2)
    (tmp_path / "step-000004" / "trainables.safetensors").write_bytes(b"cut short")
    position = newest_position(tmp_path)
    assert position.step == 2
    assert torch.equal(position.trainables["weight"], torch.full((3,), 2.0))


def test_a_half_written_checkpoint_does_not_count(tmp_path) -> None:
    write_position(tmp_path, 2, {"weight": torch.zeros(3)}, {}, {}, keep=2)
    (tmp_path / "step-000004.partial").mkdir()
    assert newest_position(tmp_path).step == 2
    assert newest_position(tmp_path / "nowhere") is None


def test_the_journal_forgets_later_steps_and_a_line_that_was_cut(tmp_path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(4):
        journal.write(step, {"loss": 1.0 / (step + 1)})
    with journal.path.open("a") as file:
        file.write('{"step": 4, "lo')
    journal.cut_after(2)
    journal.write(3, {"loss": 9.0})
    assert [row["loss"] for row in journal.rows()] == [1.0, 0.5, 1 / 3, 9.0]


if __name__ == "__main__":
    from nexus_core.checkpoint.source import open_checkpoint

    def kill(step: int, values: object) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    run(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), torch.float32, kill)
