"""Which attention reads a sequence: by its length and device, or forced by the environment; checked before use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sizes:
    """Of a model's attention: what its kernels are compiled for. window: of its sliding layers."""

    query_heads: int
    key_heads: int
    head_width: int
    window: int | None


def avoids_scores(length: int, device: torch.device) -> bool:
    """Whether a sequence of this length is read by `attention_for`'s answer, not by transformers' eager attention.

    Raises UsageError if the environment forces a name that is not known.
    """
    name = execution.forced(PART, NAMES)
    if name is not None:
        return name != EAGER
    return length > LONGER_THAN.get(device.type, LONGER_THAN["cuda"])


def attention_for(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Attend:
    """The way to attend on a device. Raises UsageError for one that the environment forces and that does not work."""
    name = execution.forced(PART, NAMES)
    names = (name,) if name else ("flex", "blocks") if device.type == "cuda" else ("blocks",)
    candidates = {name: partial(checked, name, device, dtype, sizes) for name in names}
    return execution.choose(
        PART, (device, dtype, sizes, name), f"{device.type}, long", candidates, is_forced=name is not None
    )


# Choosing may happen in inference mode, whose tensors know no gradients.
@torch.inference_mode(False)
def checked(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Attend:
    """Raises Unavailable unless output and gradients of short sequences are those of blocks."""
    if name == "blocks":
        return blocks.attend
    from nexus_gpt_oss.attention import flex

    # Documents that end within a tile, and batches of two sizes: seeing the second, torch compiles for any size, and
    # that kernel is the one that later batches meet. All else as in the model.
    for window, batch, length in ((None, 2, 300), (sizes.window, 3, 420)):
        documents_BS = torch.arange(batch * length, device=device).view(batch, length) // 113
        of_queries = (batch, sizes.query_heads, length, sizes.head_width)
        of_keys = (batch, sizes.key_heads, length, sizes.head_width)
        of_values = (batch, length, sizes.key_heads, sizes.head_width)
        generator = torch.Generator(device).manual_seed(0)
        query, key, value, sinks = (
            torch.randn(shape, device=device, generator=generator).to(dtype)
            for shape in (of_queries, of_keys, of_values, (sizes.query_heads,))
        )
        # The layer's values are a view, as they are projected; rotating makes new queries and keys.
        inputs = [tensor.requires_grad_() for tensor in (query, key, value.transpose(1, 2), sinks)]
        found, expected = (
            _answers(attend, inputs, Visibility(documents_BS, window), sizes.head_width**-0.5)
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
    with torch.enable_grad():
        output = attend(query, key, value, sinks, visibility, scaling)
        return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]
