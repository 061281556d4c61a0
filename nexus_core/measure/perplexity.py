"""How well a model predicts text: negative log-likelihood in nats per token, and perplexity.

# B sequences, S tokens each, V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

IGNORED = -100  # a target that does not count: padding, a prompt, the first token of a document


@dataclass(frozen=True)
class Perplexity:
    """Log-likelihood of some tokens under one model; adds up over batches.

    nll_nats: summed over the tokens that count.
    """

    nll_nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.nll_nats + other.nll_nats, self.tokens + other.tokens)

    @property
    def nll_nats_per_token(self) -> float:
        """Mean negative log-likelihood; NaN without tokens."""
        return self.nll_nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where float64 ends."""
        return math.inf if self.nll_nats_per_token > 700 else math.exp(self.nll_nats_per_token)


def perplexity(logits: torch.Tensor, targets: torch.Tensor) -> Perplexity:
    """The log-likelihood of targets (B, S) under logits (B, S, V), at the same positions; -100 does not count."""
    nll_nats = torch.zeros((), dtype=torch.float64, device=logits.device)
    # a sequence at a time: float32 rows of a large vocabulary are big
    for logits_SV, targets_S in zip(logits, targets, strict=True):
        losses_S = functional.cross_entropy(logits_SV.float(), targets_S, ignore_index=IGNORED, reduction="none")
        nll_nats += losses_S.double().sum()
    return Perplexity(float(nll_nats), int((targets != IGNORED).sum()))
