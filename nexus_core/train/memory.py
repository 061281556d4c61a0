"""How much memory training has taken at most, where it counts: on the GPU if there is one, else of the process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

# getrusage counts kilobytes on Linux and bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024

_STATUS = Path("/proc/self/status")


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in units of 10^9 bytes: tensors on a GPU, resident memory (mapped files included) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return _peak_resident_bytes() / 1e9


def _peak_resident_bytes() -> int:
    # On Linux getrusage starts with the peak of the process that started this one; the kernel's own count does not.
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
