"""MXFP4 to bfloat16: one expert of gpt-oss's real shape, against a copy of the result and transformers' decode."""

from __future__ import annotations

import torch
from nexus_gpt_oss import mxfp4
from nexus_gpt_oss.decoding import MODULES, ORDER

from benchmarks.backends import clock_for, devices, finished, working
from benchmarks.measurement import Measurement, compared

ROWS, COLUMNS = 5760, 2880


def run() -> list[Measurement]:
    """Time relative to copying as many bytes as the decode writes: 1.0 is the limit."""
    return [measurement for device in devices() for measurement in _on(device)]


def _on(device: torch.device) -> list[Measurement]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    groups = COLUMNS // mxfp4.GROUP
    blocks = torch.randint(0, 256, (ROWS, groups, mxfp4.GROUP_BYTES), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 125, (ROWS, groups), dtype=torch.uint8, generator=generator)
    blocks, scales = blocks.to(device), scales.to(device)
    out = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    source = torch.ones_like(out)  # memory that was never written is one page of zeros, and copies too fast

    def decode() -> torch.Tensor:
        return mxfp4.decode(blocks, scales, torch.bfloat16, out=out)

    known = tuple(name for name in MODULES if name in ORDER[device.type])
    ours = {f"nexus, {name}": run for name, run in working("decode", known, decode).items()}
    return compared(
        f"decode one 5760 x 2880 expert, {device.type}",
        {
            "copy of the result": finished(lambda: out.copy_(source)),
            **ours,
            "transformers": finished(
                lambda: convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)
            ),
            "as in OpenAI's weights.py": finished(lambda: by_ldexp(blocks, scales)),
        },
        against="copy of the result",
        rounds=15,
        clock=clock_for(device),
    )


def by_ldexp(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The obvious way, in the steps of gpt_oss/torch/weights.py: look up both nibbles, then multiply by 2^scale."""
    table = torch.tensor(mxfp4.FP4, dtype=torch.bfloat16, device=blocks.device)
    rows, groups, size = blocks.shape
    packed = blocks.reshape(rows * groups, size)
    out = torch.empty(rows * groups, 2 * size, dtype=torch.bfloat16, device=blocks.device)
    out[:, 0::2] = table[(packed & 0x0F).long()]
    out[:, 1::2] = table[(packed >> 4).long()]
    exponents = scales.int().reshape(rows * groups, 1) - mxfp4.SCALE_BIAS
    return torch.ldexp(out, exponents, out=out).view(rows, groups * 2 * size)
