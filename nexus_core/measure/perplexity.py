"""How well a model predicts text: negative log-likelihood in nats per token, and perplexity.

# T tokens, N of them that count, C of these in one chunk, D hidden size
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from nexus_core.distill.head import OutputHead
from nexus_core.distill.vocabulary import CHUNK_ELEMENTS

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


def perplexity(
    hidden_TD: torch.Tensor, targets_T: torch.Tensor, head: OutputHead, *, chunk_elements: int | None = None
) -> Perplexity:
    """The log-likelihood of targets (T,) where an output head reads hidden states (T, D); a target of -100 is left out.

    Logits exist for a chunk of the tokens only: those of 8 sequences of 512 over 201,088 tokens would take 3.3 GB.
    """
    counts_T = targets_T != IGNORED
    hidden_ND, targets_N = hidden_TD[counts_T], targets_T[counts_T]
    elements = chunk_elements or CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cpu"])
    rows = max(1, elements // head.vocabulary_size)
    nll_nats = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        losses_C = functional.cross_entropy(head.logits(hidden_CD).float(), targets_C, reduction="none")
        nll_nats += losses_C.double().sum()
    return Perplexity(float(nll_nats), len(targets_N))
