"""Ways to turn MXFP4 into numbers, one file each, all equal to the bit; which one is used is chosen by the device.

    torch_table   plain torch, everywhere; the others are checked against it before they are used
    numba_bits    CPU, where numba is installed (`pip install nexus-moe[fast]`)
    triton_bits   CUDA, with the Triton that torch's CUDA builds bring

NEXUS_GPT_OSS_DECODE=torch, numba or triton forces one.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Protocol

import torch

from nexus_gpt_oss import execution
from nexus_gpt_oss.decoding import torch_table
from nexus_gpt_oss.decoding.format import GROUP_BYTES, MAX_SCALE, PAIR_TYPES

PART = "decode"
MODULES = {"torch": "torch_table", "numba": "numba_bits", "triton": "triton_bits"}
ORDER = {"cpu": ("numba", "torch"), "cuda": ("triton", "torch")}

# Fewer numbers than this, the experts of tiny models, are decoded before a compiler has been imported.
NUMBERS_WORTH_COMPILING = 1 << 17


class Decoder(Protocol):
    """Fills pairs_RP (R, 16 G), of PAIR_TYPES[dtype], from bytes (R, G, 16) and scales (R, G), both uint8."""

    def __call__(
        self, bytes_RGB: torch.Tensor, scales_RG: torch.Tensor, pairs_RP: torch.Tensor, dtype: torch.dtype
    ) -> None: ...


def decoder(device: torch.device, dtype: torch.dtype, numbers: int) -> Decoder:
    """The way to decode so many numbers into dtype on a device. Raises UsageError for one forced that does not work."""
    order = ORDER.get(device.type, ("torch",))
    name = execution.forced(PART, tuple(MODULES))
    if name is None and (device.type == "cpu" and numbers < NUMBERS_WORTH_COMPILING):
        return torch_table.decode_pairs
    candidates = {name: partial(_checked, name, device, dtype) for name in ((name,) if name else order)}
    return execution.choose(PART, (device, dtype, name), device.type, candidates, is_forced=name is not None)


def _checked(name: str, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Raises Unavailable unless it decodes every byte at every scale, from rows that lie apart, as the table does."""
    try:
        module = importlib.import_module(f"nexus_gpt_oss.decoding.{MODULES[name]}")
    except ImportError as error:
        raise execution.Unavailable(f"{error.name or error} is not installed") from error
    found: Decoder = module.decode_pairs
    if name == "torch":
        return found
    byte = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, GROUP_BYTES)
    bytes_RGB = byte.expand(2 * (MAX_SCALE + 1), -1, -1).contiguous()[::2]
    scales_RG = torch.arange(MAX_SCALE + 1, dtype=torch.uint8, device=device)[:, None].expand(-1, 16).contiguous()
    pairs, expected = (torch.zeros((MAX_SCALE + 1, 256), dtype=PAIR_TYPES[dtype], device=device) for _ in range(2))
    found(bytes_RGB, scales_RG, pairs, dtype)
    torch_table.decode_pairs(bytes_RGB, scales_RG, expected, dtype)
    if not torch.equal(pairs, expected):
        raise execution.Unavailable(f"it decodes {int((pairs != expected).sum())} of {pairs.numel()} pairs wrongly")
    return found
