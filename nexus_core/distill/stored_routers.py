"""Router logits in one byte an expert: 256 levels between a token's least and largest logit in a layer.

Softmax does not feel a common offset, so none is stored. With logits that span 12 nats a level is 0.047 nats, which as
KL is about 0.047^2 / 24 = 9e-5 at most; what it is on the data at hand is measured by `capture`.

    # L layers, T tokens, E experts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = 255


@dataclass(frozen=True)
class StoredRouters:
    """levels (T, L, E) uint8, and steps (T, L) float16: nats between two levels."""

    levels: torch.Tensor
    steps: torch.Tensor

    @property
    def stored_bytes(self) -> int:
        return self.levels.nbytes + self.steps.nbytes


def encode(logits_TLE: torch.Tensor) -> StoredRouters:
    """Router logits before top-k in their stored form."""
    logits_TLE = logits_TLE.float()
    least_TL = logits_TLE.amin(dim=-1)
    span_TL = logits_TLE.amax(dim=-1) - least_TL
    # A little more than it must be, so that rounding to float16 never puts the largest logit beyond the last level.
    steps_TL = (span_TL / LEVELS * (1 + 2**-10)).half().clamp_min(2**-24)
    levels_TLE = ((logits_TLE - least_TL[..., None]) / steps_TL.float()[..., None]).round().clamp(0, LEVELS)
    return StoredRouters(levels_TLE.to(torch.uint8), steps_TL)


def decode(stored: StoredRouters) -> torch.Tensor:
    """Router logits (T, L, E) in float32, each token's least one 0."""
    return stored.levels.float() * stored.steps.float()[..., None]
