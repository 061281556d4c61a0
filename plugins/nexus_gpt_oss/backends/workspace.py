"""Memory for decoded experts, kept between calls: on a CPU a new 30 MB block costs as much as decoding into it."""

from __future__ import annotations

import threading
from math import prod

import torch

_held = threading.local()


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor to be overwritten, of this thread's one block for the type and device; what it held before is gone.

    On other devices than the CPU it is allocated each time: their allocators keep what is freed.
    """
    numbers = prod(shape)
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    blocks: dict[str, torch.Tensor] = _held.__dict__
    name = str(dtype)
    if name not in blocks or blocks[name].numel() < numbers:
        # The old block first, or both would be held for a moment.
        blocks.pop(name, None)
        # Without gradients whatever the mode is: under torch.inference_mode the block could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            blocks[name] = torch.empty(numbers, dtype=dtype)
    return blocks[name][:numbers].view(shape)
