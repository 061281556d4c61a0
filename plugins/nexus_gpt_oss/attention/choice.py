"""Which attention reads a sequence: by its length and device, or forced by the environment; checked before use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nexus_gpt_oss import execution
from nexus_gpt_oss.attention import LONGER_THAN, blocks
from nexus_gpt_oss.attention.visibility import Visibility

PART = "attention"
EAGER = "eager"
NAMES = (EAGER, "blocks", "flex")
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}

# Queries (B, A, S, C), keys and values (B, K, S, C), sinks (A,), visibility, scaling: (B, A, S, C).
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Visibility, float], torch.Tensor]


def avoids_scores(length: int, device: torch.device) -> bool:
    """Whether a sequence of this length is read by `attention_for`'s answer, not by transformers' eager attention.

    Raises UsageError if the environment forces a name that is not known.
    """
    name = execution.forced(PART, NAMES)
    if name is not None:
        return name != EAGER
    return length > LONGER_THAN.get(device.type, LONGER_THAN["cuda"])


def attention_for(device: torch.device, dtype: torch.dtype, head_width: int) -> Attend:
    """The way to attend on a device. Raises UsageError for one that the environment forces and that does not work."""
    name = execution.forced(PART, NAMES)
    names = (name,) if name else ("flex", "blocks") if device.type == "cuda" else ("blocks",)
    candidates = {name: partial(_checked, name, device, dtype, head_width) for name in names}
    return execution.choose(
        PART, (device, dtype, head_width, name), f"{device.type}, long", candidates, is_forced=name is not None
    )


def _checked(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> Attend:
    """Raises Unavailable unless output and gradients of short sequences are those of blocks."""
    if name == "blocks":
        return blocks.attend
    from nexus_gpt_oss.attention import flex

    # Documents that end within a tile, padding, and a window; heads in groups.
    documents_BS = torch.arange(2 * 300, device=device).view(2, 300) // 113
    for window in (None, 64):
        generator = torch.Generator(device).manual_seed(0)
        inputs = [
            torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_()
            for shape in ((2, 4, 300, head_width), (2, 2, 300, head_width), (2, 2, 300, head_width), (4,))
        ]
        found, expected = (
            _answers(attend, inputs, Visibility(documents_BS, window), head_width**-0.5)
            for attend in (flex.attend, blocks.attend)
        )
        for mine, theirs in zip(found, expected, strict=True):
            error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
            if not error <= TOLERANCES[dtype]:
                raise execution.Unavailable(f"is off by {error:.2g} from blocks")
    return flex.attend


def _answers(attend: Attend, inputs: list[torch.Tensor], visibility: Visibility, scaling: float) -> list[torch.Tensor]:
    query, key, value, sinks = inputs
    # Choosing may happen where gradients are off.
    with torch.inference_mode(False), torch.enable_grad():
        output = attend(query, key, value, sinks, visibility, scaling)
        return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]
