"""A float32 number as a bfloat16 and the 16 bits that rounding it took away: `bits = (rounded << 16) + remainder`.

Beside a bfloat16 parameter that remainder is all that its float32 master needs, 2 bytes a number instead of 4. The
remainder is signed, so a number halfway between two bfloat16 must round up in magnitude: torch rounds it to the even
one, where the difference may be +32768, which 16 bits do not hold. Source: `store_param_remainders` of Apex's
DistributedFusedAdam (https://github.com/NVIDIA/apex), which stores the same two halves.
"""

from __future__ import annotations

import torch


def split(numbers: torch.Tensor, rounded: torch.Tensor, remainders: torch.Tensor) -> None:
    """Put float32 numbers into bfloat16 `rounded` and int16 `remainders` of their shape; overwrites the numbers.

    Rounds to nearest, halves away from zero. Every finite number can be joined again to the bit, also one that rounds
    to infinity. What is infinite becomes NaN, and NaN stays NaN.
    """
    bits = numbers.view(torch.int32)
    remainders.copy_(bits)  # the low half, as int32 wraps around in int16
    # Just above halfway, so that torch rounds up. Adding 0x8000 and shifting would round alike, and turn NaN into 0.
    bits.bitwise_or_(1)
    rounded.copy_(numbers)


def join(rounded: torch.Tensor, remainders: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The float32 numbers that were split, in `out` if it is given."""
    numbers = torch.empty_like(rounded, dtype=torch.float32) if out is None else out
    numbers.copy_(rounded)
    numbers.view(torch.int32).add_(remainders)
    return numbers
