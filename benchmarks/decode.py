"""MXFP4 to bfloat16: one expert of gpt-oss's real shape, against a copy of the result and transformers' decode."""

from __future__ import annotations

import torch
from nexus_gpt_oss import mxfp4

from benchmarks.measurement import Measurement, compared

ROWS, COLUMNS = 5760, 2880


def run() -> list[Measurement]:
    """Time relative to copying as many bytes as the decode writes: 1.0 is the limit."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    groups = COLUMNS // mxfp4.GROUP
    blocks = torch.randint(0, 256, (ROWS, groups, mxfp4.GROUP_BYTES), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 125, (ROWS, groups), dtype=torch.uint8, generator=generator)
    out = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    source = torch.empty_like(out)

    return compared(
        "decode one 5760 x 2880 expert",
        {
            "copy of the result": lambda: out.copy_(source),
            "nexus": lambda: mxfp4.decode(blocks, scales, torch.bfloat16, out=out),
            "transformers": lambda: convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16),
        },
        against="copy of the result",
    )
