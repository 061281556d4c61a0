"""What is timed under each of a part's implementations, and on each device there is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from nexus_gpt_oss import execution

from nexus_core.errors import UsageError


def clock_for(device: torch.device) -> Callable[[], float]:
    """This thread's processor time where it does all the work, which other work on the machine disturbs least."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def devices() -> list[torch.device]:
    """The CPU and, where there is one, the GPU."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def under(part: str, name: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work with an implementation forced by name, until the device has done it."""

    def run() -> Any:
        os.environ[execution.variable(part)] = name
        try:
            return finished(work)()
        finally:
            del os.environ[execution.variable(part)]

    return run


def finished(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work until the device has done it."""

    def run() -> Any:
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


def working(part: str, names: tuple[str, ...], work: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Of a part's implementations those that do this work here, by name."""
    found = {}
    for name in names:
        run = under(part, name, work)
        try:
            run()
        except UsageError as error:
            print(f"  left out: {error}")
            continue
        found[name] = run
    return found
