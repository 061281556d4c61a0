"""MXFP4, the 4-bit format of GPT-OSS experts: 32 numbers share one power of two.

value = FP4[nibble] * 2 ** (scale - 127); the low nibble of a byte is the number with the even index. Scale 255 is
NaN. Sources: Open Compute Project, Microscaling Formats (MX) v1.0; how GPT-OSS lays it out: github.com/openai/gpt-oss,
gpt_oss/torch/weights.py, which `decode` equals to the bit for every byte and every scale from 0 to 254.

    # R rows (all leading dimensions together), G groups of 32 numbers; a group is 16 bytes and one scale
"""

from __future__ import annotations

import torch

from nexus_core.errors import ShapeError
from nexus_gpt_oss.decoding import decoder
from nexus_gpt_oss.decoding.format import FP4, GROUP, GROUP_BYTES, MAX_SCALE, PAIR_TYPES, POSITIVE_FP4, SCALE_BIAS

__all__ = ["FP4", "GROUP", "GROUP_BYTES", "MAX_SCALE", "PAIR_TYPES", "SCALE_BIAS", "decode", "encode"]

ENCODE_TILE_NUMBERS = 1 << 18


def decode(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The numbers (..., 32 G) that blocks (..., G, 16) and scales (..., G), both uint8, stand for.

    dtype: bfloat16 or float32; both hold every finite value exactly. out: contiguous, of that shape and type, to be
    overwritten and returned. Nothing is transposed. `nexus_gpt_oss.decoding` chooses how, by the device. Raises
    ShapeError for any other shape or type.
    """
    shape = _decoded_shape(blocks, scales, dtype)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ShapeError(
            f"mxfp4.decode: out must be contiguous {list(shape)} {dtype}, not {list(out.shape)} {out.dtype}"
        )
    groups = shape[-1] // GROUP
    if out.numel() == 0:
        return out
    bytes_RGB = blocks.reshape(-1, groups, GROUP_BYTES)
    scales_RG = scales.reshape(-1, groups)
    pairs_R = out.view(-1, shape[-1]).view(PAIR_TYPES[dtype])
    decoder(blocks.device, dtype, out.numel())(bytes_RGB, scales_RG, pairs_R, dtype)
    return out


def encode(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (..., G, 16) and scales (..., G), both uint8, nearest to weights (..., 32 G), bfloat16 or float32.

    Each number goes to the nearest of its group's sixteen, ties to the even mantissa, beyond the largest to the
    largest. Of two scales, the MX specification's (largest magnitude to [4, 8), so that what lies above 6 saturates)
    and twice that, a group takes the one with the smaller squared error, the first if equal. So what `decode` gave
    comes back with the same values. Raises ShapeError for another shape or type, or a number that is not finite.
    """
    if weights.dtype not in PAIR_TYPES:
        raise ShapeError(f"mxfp4.encode: weights must be bfloat16 or float32, not {weights.dtype}")
    if weights.dim() == 0 or weights.shape[-1] % GROUP:
        raise ShapeError(
            f"mxfp4.encode: the last dimension of weights {list(weights.shape)} must be a multiple of {GROUP}"
        )
    if not torch.isfinite(weights).all():
        raise ShapeError(f"mxfp4.encode: weights {list(weights.shape)} hold numbers that are not finite")
    groups_R = weights.detach().reshape(-1, GROUP)
    blocks_R = torch.empty((groups_R.shape[0], GROUP_BYTES), dtype=torch.uint8, device=weights.device)
    scales_R = torch.empty(groups_R.shape[0], dtype=torch.uint8, device=weights.device)
    step = ENCODE_TILE_NUMBERS // GROUP
    for start in range(0, groups_R.shape[0], step):
        tile = slice(start, start + step)
        blocks_R[tile], scales_R[tile] = _encode_groups(groups_R[tile].float())
    leading = (*weights.shape[:-1], weights.shape[-1] // GROUP)
    return blocks_R.view(*leading, GROUP_BYTES), scales_R.view(leading)


def _encode_groups(weights_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    magnitudes_RN = weights_RN.abs()
    # frexp gives maximum = m * 2**x with m in [0.5, 1), so floor(log2(maximum)) - 2 is x - 3; for zero it gives x = 0.
    exponents_R = torch.frexp(magnitudes_RN.amax(dim=-1)).exponent - 3
    low_R = (exponents_R + SCALE_BIAS).clamp_(0, MAX_SCALE)
    high_R = (low_R + 1).clamp_(max=MAX_SCALE)
    low_codes_RN, low_error_R = _nearest(magnitudes_RN, low_R)
    high_codes_RN, high_error_R = _nearest(magnitudes_RN, high_R)
    # Errors are in units of each candidate's own scale, which differ by two: four when squared.
    takes_high_R = 4 * high_error_R < low_error_R
    scales_R = torch.where(takes_high_R, high_R, low_R)
    codes_RN = torch.where(takes_high_R.unsqueeze(-1), high_codes_RN, low_codes_RN)
    codes_RN += torch.signbit(weights_RN) * 8
    blocks_RB = codes_RN[:, 0::2] | (codes_RN[:, 1::2] << 4)
    return blocks_RB.to(torch.uint8), scales_R.to(torch.uint8)


def _nearest(magnitudes_RN: torch.Tensor, scales_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0-7 of the nearest positive numbers at these scales, and each group's squared error in scale units."""
    scaled_RN = magnitudes_RN * torch.exp2((SCALE_BIAS - scales_R).to(torch.float64)).float().unsqueeze(-1)
    values = torch.tensor(POSITIVE_FP4, dtype=torch.float32, device=scaled_RN.device)
    middles = (values[:-1] + values[1:]) / 2
    # A number on the middle goes down unless the code below is odd: there the boundary moves one step down.
    is_odd = torch.arange(len(middles), device=middles.device) % 2 == 1
    boundaries = torch.where(is_odd, torch.nextafter(middles, torch.zeros_like(middles)), middles)
    codes_RN = torch.bucketize(scaled_RN, boundaries, out_int32=True)
    return codes_RN, (scaled_RN - values[codes_RN]).square().sum(dim=-1)


def _decoded_shape(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Size:
    if dtype not in PAIR_TYPES:
        raise ShapeError(f"mxfp4.decode: gives bfloat16 or float32, not {dtype}")
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ShapeError(f"mxfp4.decode: blocks and scales must be uint8, not {blocks.dtype} and {scales.dtype}")
    if blocks.dim() < 2 or blocks.shape[-1] != GROUP_BYTES or blocks.shape[:-1] != scales.shape:
        raise ShapeError(
            f"mxfp4.decode: blocks {list(blocks.shape)} and scales {list(scales.shape)} must be "
            f"(..., G, {GROUP_BYTES}) and (..., G)"
        )
    return torch.Size((*scales.shape[:-1], scales.shape[-1] * GROUP))
