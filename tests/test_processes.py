"""Several processes: how they start, meet, fail and end together, and that their work is that of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import processes_script
import pytest
import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from training_runs import write_texts
from waiting import wait_for

from nexus_core import processes
from nexus_core.cli import main, nexus
from nexus_core.cli.launch import is_to_launch, launch
from nexus_core.errors import StageError, UsageError
from nexus_core.pipeline.run import run_recipe
from nexus_core.processes import World, world
from nexus_core.recipe.load import load_recipe
from nexus_core.stages import parts
from nexus_core.stages.shards import Shard
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.saliency import FILE_NAME as SALIENCY
from nexus_core.statistics.saliency import SaliencyFile

SCRIPT = processes_script.__file__
SPLITTING = ("collect", "capture", "validate")


def command(mode: str, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), mode, *arguments]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


EXCHANGED = {
    "gathered": [{"rank": 0, "third": 1 / 3}, {"rank": 1, "third": 1 / 3}],
    "broadcast": "of the first",
    "together": ["done once"],
    "sum": [2.0, 1.0],
}


def test_processes_exchange_values(capfd) -> None:
    assert launch(2, command("exchange")) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == EXCHANGED
    assert err == ""


def test_torchrun_starts_them_as_well() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, SCRIPT, "exchange"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == EXCHANGED


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_and_is_said_once(rank: int, capfd) -> None:
    started = time.monotonic()
    assert launch(2, command(f"fail-{rank}")) == 2
    assert time.monotonic() - started < 60
    assert capfd.readouterr().err == "Error: this file is wrong; take another\n"


def test_a_killed_process_ends_all_and_the_launcher_says_so(capfd) -> None:
    with pytest.raises(StageError, match=r"process 1 of 2 was ended by SIGKILL; if memory ran out, .* type the same"):
        launch(2, command("kill"), as_json=True)
    assert capfd.readouterr() == ("", ""), "the first process was there to print its own JSON"


def launcher(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process that launched three that sleep, and their ids."""
    program = (
        f"from nexus_core.cli.launch import launch; import sys; sys.exit(launch(3, {command('sleep', str(folder))}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(folder.glob("pid-*"))) == 3)
    return process, [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_passed_on_to_all(tmp_path: Path, asked: signal.Signals) -> None:
    process, pids = launcher(tmp_path)
    process.send_signal(asked)
    assert process.wait(timeout=30) == 130
    assert sorted(path.name for path in tmp_path.glob("inter*")) == ["interrupted-0", "interrupted-1", "interrupted-2"]
    assert not any(map(is_alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_a_killed_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    process, pids = launcher(tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, pids)), seconds=10)
    assert list(tmp_path.glob("inter*")) == []


def test_the_environment_says_which_of_several_this_is(monkeypatch, capsys) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world() == World(0, 1, 0)
    assert (is_to_launch(None), is_to_launch(None, 2), is_to_launch(1, 2), is_to_launch(3)) == (
        False,
        True,
        False,
        True,
    )
    assert processes.gather(1) == [1]
    assert processes.together(lambda: "alone") == "alone"
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world() == World(3, 4, 1)
    assert not world().is_first
    assert is_to_launch(4) is is_to_launch(None, 2) is False
    with pytest.raises(UsageError, match="this is one of 4 that were started; leave --processes out"):
        is_to_launch(2)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UsageError, match="RANK='4', WORLD_SIZE='4', LOCAL_RANK='1', which is no place among processes"):
        world()
    with pytest.raises(SystemExit) as caught:
        main(["run", "no.yaml"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("which is no place among processes") == 1


RECIPE = """
schema: 1
model: {{path: {model}}}
data:
  domain: [{{path: {domain}, held_out: 0.3}}]
  general: [{{path: {general}, held_out: 0.3}}]
collect: {{tokens: 900, sequence_length: 32, batch_size: 2, keep_inputs: 9, keep_probabilities: 500}}
select: {{strategy: saliency, top_k: 2}}
train:
  teacher: {{kind: offline, top_logits: 16}}
  max_steps: 2
  sequence_length: 16
  batch_size: 4
validate: {{samples: 7, sequence_length: 32, batch_size: 2}}
run: {{device: cpu, store: {store}, tracking: {{enabled: false}}}}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Another number of threads rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Path, Path]:
    """The store of one process, and another whose splitting stages two processes did, the others being reused."""
    folder = tmp_path_factory.mktemp("runs")
    model = write_tiny_checkpoint(folder / "base", vocabulary=320, tokenizer=True)
    texts = {name: sources[0].path for name, sources in write_texts(folder).items()}
    for store in ("one", "two"):
        (folder / f"{store}.yaml").write_text(RECIPE.format(model=model, store=folder / store, **texts))
    run_recipe(load_recipe(folder / "one.yaml"))
    shutil.copytree(folder / "one", folder / "two", symlinks=True)
    for stage in SPLITTING:
        shutil.rmtree(folder / "two" / stage)
    flags = ["--processes", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "nexus_core", "run", str(folder / "two.yaml"), *flags],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert [name for name, stage in answer["stages"].items() if not stage["reused"]] == list(SPLITTING)
    assert done.stderr.count("collect   runs") == 1
    return folder / "one", folder / "two"


def outputs(stores: tuple[Path, Path], stage: str) -> tuple[Path, Path]:
    """Both outputs of a stage, which have one key and the same files."""
    first, second = (next((store / stage).iterdir()) for store in stores)
    assert first.name == second.name
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (first, second)]
    assert names[0] == names[1]
    return first, second


def metrics(folder: Path) -> dict[str, float]:
    measured = json.loads((folder / "stage.json").read_text())["metrics"]
    return {name: value for name, value in measured.items() if name != "tokens_per_second"}


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_two_processes_collect_what_one_does(stores) -> None:
    one, two = outputs(stores, "collect")
    assert metrics(two) == pytest.approx(metrics(one), rel=1e-9)
    for read in (RouterStatistics.load, lambda folder: (SaliencyFile(folder / SALIENCY).load(), None)):
        (sums, about), (others, about_others) = read(one), read(two)
        assert about == about_others
        assert_close(sums.state(), others.state())
    for name in ("moe_inputs.safetensors", "router_probabilities.npz", "sampling_report.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


def test_two_processes_store_the_teacher_of_one_to_the_byte(stores) -> None:
    one, two = outputs(stores, "capture")
    chunks = [path.name for path in one.glob("chunks/*.safetensors")]
    assert len(chunks) > 1, "each process had one to do"
    for path in one.rglob("*"):
        if path.is_file() and path.name != "stage.json":
            assert (two / path.relative_to(one)).read_bytes() == path.read_bytes(), path.name
    assert metrics(one) == metrics(two)


def test_two_processes_measure_what_one_does(stores) -> None:
    one, two = outputs(stores, "validate")
    measured, others = metrics(one), metrics(two)
    assert others.pop("verdict") == measured.pop("verdict")
    assert others == pytest.approx(measured, rel=1e-9)
    (report, other) = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    assert other["router"]["layers"] == [pytest.approx(layer, rel=1e-9) for layer in report["router"]["layers"]]
    assert other["sets"]["domain"]["tokens"] == report["sets"]["domain"]["tokens"]


def test_a_command_of_several_processes_writes_and_prints_once(stores, tmp_path: Path) -> None:
    folder = stores[0].parent
    flags = ["--data", str(folder / "domain.jsonl"), "--tokens", "300", "--sequence-length", "32", "--json"]
    command = [sys.executable, "-m", "nexus_core", "collect", str(folder / "base"), *flags, "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "two"), "--processes", "2"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["metrics"]["tokens"] == 300
    nexus.main([*command[3:], str(tmp_path / "one")], "nexus", standalone_mode=False)
    (sums, _), (others, _) = (RouterStatistics.load(tmp_path / name) for name in ("one", "two"))
    assert_close(sums.state(), others.state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_part_that_was_done_is_not_done_again(tmp_path: Path, monkeypatch) -> None:
    routed: list[str] = []

    def route(folder: Path, shard: Shard) -> dict[str, float]:
        routed.append(str(shard))
        if str(shard) == "2/2" and len(routed) == 2:
            raise StageError("killed")
        return {"tokens": 1}

    def run(rank: int, identity: str = "a") -> None:
        monkeypatch.setattr(parts, "world", lambda: World(rank, 2, rank))
        parts.in_parts(route, 8, identity, tmp_path)

    monkeypatch.setattr(parts, "barrier", lambda: None)
    monkeypatch.setattr(parts, "together", lambda action: None)
    run(0)
    with pytest.raises(StageError):
        run(1)
    run(0)
    run(1)
    run(1)
    assert routed == ["1/2", "2/2", "2/2"]
    run(0, identity="another text")
    assert routed[3:] == ["1/2"]
    parts.forget_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []
