"""How much memory training has taken at most, where it counts: on the GPU if there is one, else of the process."""

from __future__ import annotations

import resource
import sys

import torch

# getrusage counts kilobytes on Linux and bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in units of 10^9 bytes: tensors on a GPU, resident memory (mapped files included) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9
