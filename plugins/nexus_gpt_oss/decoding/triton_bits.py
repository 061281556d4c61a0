"""Decoding on a GPU in one pass of integer arithmetic, so that no type's rounding or flushing can touch a bit.

A bfloat16's upper bits are sign, eight bits of exponent, seven of fraction; FP4 at any scale fits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nexus_gpt_oss.decoding.format import GROUP_BYTES

BYTES_PER_PROGRAM = 2048


def decode_pairs(bytes_RGB: torch.Tensor, scales_RG: torch.Tensor, pairs_RP: torch.Tensor, dtype: torch.dtype) -> None:
    """As `torch_table.decode_pairs`, on a CUDA device."""
    packed, scales = bytes_RGB.contiguous(), scales_RG.contiguous()
    count = packed.numel()
    launch: Any = _decode_kernel[(triton.cdiv(count, BYTES_PER_PROGRAM),)]
    with torch.cuda.device_of(packed):
        launch(packed, scales, pairs_RP, count, BYTES_PER_PROGRAM, GROUP_BYTES, dtype != torch.bfloat16)


@triton.jit
def bfloat16_bits(nibble, scale):
    """The bits of FP4[nibble] * 2**(scale - 127) as bfloat16, int32, 0 to 0xffff. nibble, scale: int32.

    An FP4's magnitude is two bits of exponent and one of fraction, so that 1 to 6 are (magnitude << 6) away from a
    power of two; 0.5, a subnormal there, is one below the pattern. Exponents under 1 are bfloat16's own subnormals.
    """
    magnitude = nibble & 7
    # Biased exponent of the number, and its significand with the leading one, 1.f as 1f << 6.
    exponent = scale + tl.where(magnitude < 2, -1, (magnitude >> 1) - 1)
    significand = tl.where(magnitude < 2, 128, 128 | ((magnitude & 1) << 6))
    normal = (exponent << 7) | (significand & 127)
    subnormal = significand >> tl.minimum(tl.maximum(1 - exponent, 0), 31)
    bits = tl.where(exponent < 1, subnormal, normal)
    bits = tl.where(exponent > 254, 0x7F80, bits)
    bits = tl.where(magnitude == 0, 0, bits)
    bits = tl.where(scale == 255, 0x7FC0, bits)
    return bits | ((nibble & 8) << 12)


@triton.jit
def _decode_kernel(packed, scales, pairs, count, BYTES: tl.constexpr, GROUP_BYTES: tl.constexpr, IS_WIDE: tl.constexpr):
    # In 64 bits: a layer of 128 experts has more than 2**30 bytes of pairs, and programs may count further still.
    place = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = place < count
    byte = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + place // GROUP_BYTES, mask=inside, other=0).to(tl.int32)
    low, high = bfloat16_bits(byte & 15, scale), bfloat16_bits(byte >> 4, scale)
    if IS_WIDE:
        # float32 is bfloat16 with sixteen more bits of fraction.
        tl.store(pairs + place, (low.to(tl.int64) << 16) | (high.to(tl.int64) << 48), mask=inside)
    else:
        tl.store(pairs + place, low | (high << 16), mask=inside)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET=1."""
    return not isinstance(_decode_kernel, triton.runtime.JITFunction)
