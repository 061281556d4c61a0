"""What MXFP4 is made of; see `nexus_gpt_oss.mxfp4`."""

from __future__ import annotations

import torch

GROUP = 32
GROUP_BYTES = GROUP // 2
SCALE_BIAS = 127
MAX_SCALE = 254

POSITIVE_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*POSITIVE_FP4, *(-value for value in POSITIVE_FP4))

# Two numbers of each type, as the integer of the same size: one lookup moves one byte's pair.
PAIR_TYPES = {torch.bfloat16: torch.int32, torch.float32: torch.int64}
