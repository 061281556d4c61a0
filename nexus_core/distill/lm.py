"""The loss that adds the skill: language modelling on learnt text.

# N learnt tokens, V vocabulary
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nexus_core.distill.chunks import sum_over_tokens
from nexus_core.distill.signals import LEARNT_LOGITS, Signals
from nexus_core.types import Strategy


def lm(signals: Signals, parameters: None = None) -> torch.Tensor:
    """Cross entropy of the next token on learnt text, in nats per learnt token of the step.

    Zero if the micro-batch has no learnt token.
    """
    logits_NV, targets_N = signals.learnt_logits, signals.learnt_targets
    if logits_NV is None or targets_N is None:
        raise ValueError("lm needs the student's logits and targets of learnt tokens")
    return sum_over_tokens(_cross_entropy, logits_NV, targets_N) / max(signals.step_tokens.learnt, 1)


def _cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


STRATEGY = Strategy(
    name="lm",
    function=lm,
    summary="Cross entropy of the next token on learnt sets, nats per token.",
    needs=frozenset({LEARNT_LOGITS}),
)
