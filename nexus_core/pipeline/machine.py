"""What this machine has: memory it may use, disk, its GPU, and what its processor computes and copies in a second."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from nexus_core.estimate.devices import Device, recognise

# The probe: products of this size, and copies of a buffer that no cache holds, for about so long each.
PROBE_ROWS = 1024
PROBE_NUMBERS = 2**24
PROBE_SECONDS = 0.1

# Long runs reach less of what a product of large matrices reaches: small pieces, and everything between products.
REACHED_ON_CPU = 0.6

_CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def found_device(name: str, dtype: str | None) -> Device:
    """The device called `name` ("cpu", "cuda", "cuda:1") of this machine, for computing in `dtype`.

    Without a type a processor is not measured: it then takes no time for anything.
    """
    if name.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(name)
        return recognise(properties.name, properties.total_memory)
    if dtype is None:
        return Device("cpu", "cpu", host_memory_bytes(), math.inf, math.inf)
    flops, bandwidth = probed(dtype)
    return Device("cpu", "cpu", host_memory_bytes(), bandwidth, flops * REACHED_ON_CPU, measured=True)


@lru_cache(maxsize=2)
def probed(dtype: str) -> tuple[float, float]:
    """Floating-point operations per second of a matrix product, and bytes per second read and written by a copy."""
    import torch

    left = torch.ones(PROBE_ROWS, PROBE_ROWS, dtype=getattr(torch, dtype))
    seconds = _shortest(lambda: left @ left)
    source = torch.ones(PROBE_NUMBERS)
    target = torch.empty_like(source)
    copied = _shortest(lambda: target.copy_(source))
    return 2 * PROBE_ROWS**3 / seconds, 2 * source.nbytes / copied


def _shortest(run: Callable[[], object]) -> float:
    """Seconds of the quickest of several calls, the first not counted."""
    run()
    best, ends = float("inf"), time.perf_counter() + PROBE_SECONDS
    while True:
        started = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - started)
        if now > ends:
            return best


def host_memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less where its control group has a limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CONTROL_GROUPS:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # another system, or the word "max"
            continue
    return min(limits)


def free_disk_bytes(folder: Path) -> int:
    """Free bytes where the folder is, or would be."""
    return shutil.disk_usage(_existing(folder)).free


def on_one_disk(first: Path, second: Path) -> bool:
    """Whether two folders, there or to be made, share a file system, and so its free bytes."""
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def _existing(folder: Path) -> Path:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
