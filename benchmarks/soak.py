"""Kills runs at random moments and shows that they end as undisturbed ones: `python -m benchmarks.soak --kills 50`.

What is killed is `nexus run` over `capture` and `train`, with one process and with two at each ZeRO stage; of two, the
first, the second or both. After every kill each finished file is compared with the undisturbed run's, byte by byte; the
run is then started again, until it ends. Processes are forked from one that has imported torch, or the imports would
take longer than the work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from nexus_gpt_oss import synthetic
from safetensors.torch import load_file

from nexus_core.cli import main as nexus
from nexus_core.train import teacher_store

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_offline.yaml"

SMALL = {
    "collect.tokens": 2_000,
    "collect.sampling.candidates": 100,
    "train.max_steps": 12,
    "train.sequence_length": 32,
    "train.batch_size": 2,
    "train.gradient_accumulation": 2,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 3,
    "train.evaluate.every": 4,
    "train.evaluate.sequences": 4,
    "run.device": "cpu",
    "run.tracking.enabled": "false",
}
CHUNK_TOKENS = 128

# Files that must be those of the undisturbed run as soon as they have their names, and which folder each is under.
WHOLE = re.compile(
    r"capture/[^/]+/(capture\.json|chunks/[^/.]+\.(safetensors|json))"
    r"|train/[^/]+/((checkpoints|best)/step-\d+/[^/]+\.safetensors|model/[^/]+)"
)
RESULT = "train/{}/model/nexus_shared_experts.safetensors"

# How long a process may take to notice that another one is gone, before it is killed as the launcher would: one that
# waits for the other to come, at the very start, does not notice.
PATIENCE_SECONDS = 20.0


@dataclass
class Setting:
    """A way of running, and what came of killing it."""

    name: str
    processes: int = 1
    zero_stage: int | None = None
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    stopped: int = 0
    runs: int = 0
    compared: int = 0
    differing: list[str] = field(default_factory=list)

    def arguments(self, store: Path) -> list[str]:
        settings = SMALL | {"model.path": store.parent / "model", "run.store": store}
        if self.zero_stage is not None:
            settings["run.deepspeed.zero_stage"] = self.zero_stage
        return ["run", str(RECIPE), "--until", "train", *(f"--set={key}={value}" for key, value in settings.items())]


SETTINGS = (
    Setting("one process"),
    Setting("two, ZeRO 1", 2, 1),
    Setting("two, ZeRO 2", 2, 2),
    Setting("two, ZeRO 3", 2, 3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="over all ways of running together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the processes that are killed")
    parser.add_argument("--only", type=int, action="append", help="number of a way of running, from 0; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher_store.CHUNK_TOKENS = CHUNK_TOKENS
    import_everything()
    chosen = [SETTINGS[number] for number in arguments.only or range(len(SETTINGS))]
    # Not a TemporaryDirectory: a forked run that ends would tidy it up.
    root = Path(tempfile.mkdtemp(prefix="nexus-soak-"))
    try:
        results = {}
        for number, setting in enumerate(chosen):
            # Of the kills that are left, the same number for each that is left.
            kills = (arguments.kills - sum(done.kills.total() for done in chosen)) // (len(chosen) - number)
            generator = random.Random(f"{arguments.seed} {setting.name}")
            results[setting.name] = soak(setting, kills, root / str(number), generator)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print("\n".join(table(chosen, results)))
    sys.exit(any(setting.differing for setting in chosen))


def soak(setting: Setting, kills: int, root: Path, generator: random.Random) -> dict[str, torch.Tensor]:
    """Kill runs of one setting so many times; returns the trained tensors of the undisturbed run."""
    undisturbed, started = root / "undisturbed", time.monotonic()
    prepare(undisturbed, root / "log")
    begun = time.monotonic()
    end = attempt(setting, undisturbed, root / "log")
    if end != [0] * setting.processes:
        raise SystemExit(f"{setting.name}: the undisturbed run failed:\n{(root / 'log').read_text()[-3000:]}")
    setting.seconds = time.monotonic() - begun
    expected = finished_files(undisturbed)
    while setting.kills.total() < kills:
        store = root / f"run-{setting.runs}"
        shutil.copytree(undisturbed, store, symlinks=True, ignore=shutil.ignore_patterns("capture", "train", "latest"))
        setting.runs += 1
        is_done = False
        while not is_done:
            delay = generator.uniform(0.0, setting.seconds) if setting.kills.total() < kills else None
            victims = generator.choice(([0], [1], [0, 1])) if setting.processes > 1 else [0]
            ends = attempt(setting, store, root / "log", delay, victims)
            is_done = not any(ends)
            if -signal.SIGKILL in ends:
                setting.kills[stage_under_way(store)] += 1
            elif not is_done:
                raise SystemExit(f"{setting.name}: failed with {ends}:\n{(root / 'log').read_text()[-3000:]}")
            compare(setting, expected, finished_files(store), store, is_done=is_done)
            print(
                f"{time.monotonic() - started:6.0f} s  {setting.name:<14} run {setting.runs}, "
                f"{setting.kills.total()} of {kills} kills, ended with {ends}",
                file=sys.stderr,
            )
        shutil.rmtree(store)
    (result,) = undisturbed.glob(RESULT.format("*"))
    return load_file(result)


def import_everything() -> None:
    """Import what the runs would, so that what is forked from this process has it; pictures are left out."""
    from matplotlib.figure import Figure

    from nexus_core.models import register_auto
    from nexus_core.stages import train  # noqa: F401

    patch.object(Figure, "savefig", lambda self, path, **options: Path(path).write_bytes(b"")).start()
    register_auto()
    # As nexus_core.train.engines imports it.
    os.environ["DS_ACCELERATOR"] = "cpu"
    with redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401


def prepare(store: Path, log: Path) -> None:
    """Everything before `capture`."""
    arguments = Setting("").arguments(store)
    arguments[arguments.index("train")] = "convert"
    store.parent.mkdir(parents=True, exist_ok=True)
    synthetic.write(store.parent / "model", synthetic.config("tiny"), tokenizer=True)
    child = fork(arguments, {}, log)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"the stages before capture failed:\n{log.read_text()[-3000:]}")


def attempt(
    setting: Setting, store: Path, log: Path, delay: float | None = None, victims: list[int] | None = None
) -> list[int]:
    """Start a run, kill its processes `victims` after `delay` seconds, and return all processes' exit codes."""
    log.unlink(missing_ok=True)
    environments = [places(rank, setting.processes) for rank in range(setting.processes)]
    port = str(free_port())
    started = time.monotonic()
    children = [
        fork(setting.arguments(store), place | {"MASTER_PORT": port} if place else {}, log) for place in environments
    ]
    ends: dict[int, int] = {}
    killed_at = None
    while len(ends) < len(children):
        for child in children:
            if child not in ends:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    ends[child] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if delay is not None and killed_at is None and now - started >= delay:
            killed_at = now
            for victim in victims or []:
                if children[victim] not in ends:
                    os.kill(children[victim], signal.SIGKILL)
        if killed_at is not None and now - killed_at > PATIENCE_SECONDS:
            killed_at, victims = now, [number for number, child in enumerate(children) if child not in ends]
            setting.stopped += len(victims)
            said = log.read_text()[-200:] if log.exists() else ""
            print(f"{setting.name}: {victims} did not notice; last words: {said!r}", file=sys.stderr)
            for victim in victims:
                os.kill(children[victim], signal.SIGKILL)
        time.sleep(0.01)
    return [ends[child] for child in children]


def places(rank: int, size: int) -> dict[str, str]:
    """The environment of one of several processes."""
    if size == 1:
        return {}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return place | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fork(arguments: list[str], environment: dict[str, str], log: Path) -> int:
    """A child that runs `nexus ARGUMENTS` and says what it has to say into `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        nexus(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished_files(store: Path) -> dict[str, Path]:
    """What has its final name, by its path without the stages' keys, also in folders that are still filled."""
    found = {}
    for path in store.rglob("*"):
        relative = path.relative_to(store).as_posix()
        # A partial folder's name is the key between a point and an ending.
        under = re.sub(r"^(\w+)/\.?([0-9a-f]+)(\.partial)?/", r"\1/\2/", relative)
        if path.is_file() and WHOLE.fullmatch(under):
            found[under] = path
    return found


def compare(setting: Setting, expected: dict[str, Path], found: dict[str, Path], store: Path, *, is_done: bool) -> None:
    """Note files that are not the undisturbed run's; at the end, also those that are missing."""
    for name, path in found.items():
        setting.compared += 1
        if name not in expected:
            if "/step-" in name:
                load_file(path)  # of an earlier step, which the undisturbed run has removed by now
            else:
                setting.differing.append(f"{name}: is not of the undisturbed run")
        elif path.read_bytes() != expected[name].read_bytes():
            setting.differing.append(f"{name}: differs")
    if is_done:
        setting.differing += [f"{name}: is missing" for name in expected if name not in found]
        for record in store.glob("*/*/stage.json"):
            json.loads(record.read_text())


def stage_under_way(store: Path) -> str:
    """Which stage a killed run was in."""
    under_way = [stage for stage in ("train", "capture") if any((store / stage).glob(".*.partial"))]
    return under_way[0] if under_way else "between"


def table(settings: list[Setting], results: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    lines = [
        "| processes | undisturbed | kills (capture, train, between) | left waiting | runs | files compared | "
        "not the same | weights against one process |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = results[settings[0].name]
    for setting in settings:
        kills = ", ".join(str(setting.kills[stage]) for stage in ("capture", "train", "between"))
        mine = results[setting.name]
        furthest = max(float((mine[name] - tensor).abs().max()) for name, tensor in first.items())
        lines.append(
            f"| {setting.name} | {setting.seconds:.1f} s | {setting.kills.total()} ({kills}) | "
            f"{setting.stopped} | {setting.runs} | {setting.compared:,} | {len(setting.differing)} | {furthest:.1e} |"
        )
    return lines + [f"{setting.name}: {problem}" for setting in settings for problem in setting.differing[:10]]


if __name__ == "__main__":
    main()
