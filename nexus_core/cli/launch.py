"""Starts several processes of one command on this machine, and sees to it that they end together.

Each is told its place in the environment, as torchrun would, and meets the others by `nexus_core.processes`. When one
ends badly the others are stopped; an interruption is passed on to all; when this process dies, they die with it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from types import FrameType
from typing import Any, NoReturn

import click

from nexus_core.cli.output import print_json
from nexus_core.errors import StageError, UsageError
from nexus_core.processes import (
    INTERRUPTED,
    LISTENING,
    LOST_CONTACT,
    OtherProcessFailed,
    World,
    join,
    leave,
    lost_contact,
    world,
)

# The process that started this one, in the environment of those that `launch` starts.
LAUNCHER = "NEXUS_LAUNCHER"

# What torchrun sets whatever the number of processes.
TORCHRUN = "TORCHELASTIC_RUN_ID"

# How long the others may take to notice for themselves that one has failed, and then to obey a signal.
NOTICE_SECONDS, OBEY_SECONDS = 10.0, 20.0
POLL_SECONDS = 0.05

PR_SET_PDEATHSIG = 1

processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Work with so many processes on this machine, each with a GPU of its own if there are any.",
)


def in_processes(work: Callable[..., None]) -> Callable[..., int]:
    """Give a command the flag `--processes`: it is then called by so many; only the first one is to print."""

    @processes_option
    @wraps(work)
    def command(processes: int | None, as_json: bool, **given: Any) -> int:
        if is_to_launch(processes):
            return launch(processes or 1, own_command(), as_json=as_json)
        join()
        try:
            work(as_json=as_json, **given)
        except RuntimeError as error:
            failed = lost_contact(error)
            if failed is None:
                raise
            raise failed from error
        leave()
        return 0

    return command


def is_to_launch(flag: int | None, of_recipe: int = 1) -> bool:
    """Whether this process should start others, or is one of several, or all there is to be.

    flag: what `--processes` says; it goes before the recipe, and a launcher's number before that. Raises UsageError if
    a launcher started another number than the flag says.
    """
    here = world()
    if here.alone and TORCHRUN not in os.environ:
        return (flag or of_recipe) > 1
    if flag not in (None, here.size):
        raise UsageError(f"--processes {flag}: this is one of {here.size} that were started; leave --processes out")
    return False


def own_command() -> list[str]:
    """The command line that this process was started with."""
    arguments = click.get_current_context().find_root().obj or sys.argv[1:]
    return [sys.executable, "-m", "nexus_core", *arguments]


def launch(processes: int, command: Sequence[str], *, as_json: bool = False) -> int:
    """Run a command in so many processes, and return the exit code of all of them.

    Raises StageError if one was killed or all fell silent; of other failures, the process that failed has said why.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening, _Signals() as signals:
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                started.append(_start(World(rank, processes, rank), listening, command))
            first_bad = _wait(started, signals)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    codes = [process.returncode for process in started]
    if not any(codes):
        return 0
    if signals.count:
        return INTERRUPTED
    said = [code for code in codes if code > 0 and code != LOST_CONTACT]
    if said:
        return said[0]
    sentence = _what_became_of(first_bad, codes)
    if as_json and codes[0] < 0:  # else the first process has printed its object
        print_json({"status": "failed", "error": sentence})
    raise StageError(sentence)


def _what_became_of(rank: int, codes: Sequence[int]) -> str:
    again = "finished stages are kept, type the same command again to go on"
    if codes[rank] < 0:
        name = signal.Signals(-codes[rank]).name
        memory = "; if memory ran out, the system's log says so" if name == "SIGKILL" else ""
        return f"process {rank} of {len(codes)} was ended by {name}{memory}; {again}"
    return f"the {len(codes)} processes lost contact with each other, and none has said why; {again}"


def end_process(code: int) -> NoReturn:
    """End one of several processes with all that is to be done at the end, but without unloading its libraries one by
    one: the threads that connected the processes may abort it then, with all its work done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_launcher() -> None:
    """Have the kernel end this process when the one that launched it dies; nothing if nobody launched it."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before it could be asked for
        os._exit(LOST_CONTACT)


def stopped_by_launcher(number: int, frame: FrameType | None) -> None:
    """The handler of the signal by which the launcher ends a process when another one has failed."""
    raise OtherProcessFailed("another process failed")


def _start(here: World, listening: socket.socket, command: Sequence[str]) -> subprocess.Popen[bytes]:
    host, port = listening.getsockname()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // here.size))}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # a machine need not be able to resolve its own name
    place = {
        "RANK": str(here.rank),
        "LOCAL_RANK": str(here.local_rank),
        "WORLD_SIZE": str(here.size),
        "LOCAL_WORLD_SIZE": str(here.size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        LISTENING: str(listening.fileno()),
        LAUNCHER: str(os.getpid()),
    }
    return subprocess.Popen(
        command,
        env=defaults | os.environ | place,
        stdin=subprocess.DEVNULL,
        stdout=None if here.is_first else subprocess.DEVNULL,
        pass_fds=[listening.fileno()] if here.is_first else [],
        # The keyboard's Ctrl-C comes to this process only, which passes it on once.
        start_new_session=True,
    )


class _Signals:
    """Notes that this process was asked to stop, instead of stopping it; `count` times by now."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _wait(started: Sequence[subprocess.Popen[bytes]], signals: _Signals) -> int:
    """Until all have ended, or patience with them has: those that still run then are to be killed.

    Returns the rank of the first that ended badly; 0 if none did.
    """
    first_bad, since, is_told = 0, None, False
    while None in (codes := [process.poll() for process in started]):
        now = time.monotonic()
        if signals.count and not is_told:
            _send(started, signal.SIGINT)
            since, is_told = now, True
        bad = [rank for rank, code in enumerate(codes) if code]
        if since is None and bad:
            first_bad, since = bad[0], now
        if since is not None and not is_told and now - since > NOTICE_SECONDS:
            _send(started, signal.SIGTERM)
            since, is_told = now, True
        if signals.count > 1 or (since is not None and is_told and now - since > OBEY_SECONDS):
            break
        time.sleep(POLL_SECONDS)
    return first_bad


def _send(started: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)
