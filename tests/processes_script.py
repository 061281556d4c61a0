"""What one of several processes does in tests of the launcher: `python processes_script.py MODE [FOLDER]`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from nexus_core import processes
from nexus_core.cli.launch import die_with_launcher, end_process
from nexus_core.cli.output import exit_code_of, quieten
from nexus_core.errors import UsageError


def exchange() -> None:
    """Everything that processes tell each other, printed by the first."""
    import torch

    here = processes.join()
    told = {
        "gathered": processes.gather({"rank": here.rank, "third": 1 / 3}),
        "broadcast": processes.broadcast("of the first" if here.is_first else None),
        "together": processes.together(lambda: ["done once"]),
        "sum": processes.sum_in_place(torch.tensor([1.0, here.rank], dtype=torch.float64)).tolist(),
    }
    assert all(same == told for same in processes.gather(told)), "not the same on all"
    processes.leave()
    if here.is_first:
        print(json.dumps(told))


def fail(rank: int) -> None:
    """One process fails while the others wait for it."""
    here = processes.join()
    if here.rank == rank:
        raise UsageError("this file is wrong; take another")
    processes.barrier()


def kill() -> None:
    """The second process is killed while the first one waits for it."""
    if processes.join().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


def sleep(folder: Path) -> None:
    """Without the others; leaves its process id, and its rank if it is interrupted."""
    (folder / f"pid-{os.getpid()}").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / f"interrupted-{os.environ['RANK']}").touch()
        raise


def main(mode: str, *arguments: str) -> None:
    die_with_launcher()
    quieten()
    actions = {
        "exchange": exchange,
        "fail-0": lambda: fail(0),
        "fail-1": lambda: fail(1),
        "kill": kill,
        "sleep": lambda: sleep(Path(arguments[0])),
    }
    try:
        actions[mode]()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(exit_code_of(error, debug=False))
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
