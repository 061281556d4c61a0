"""The loss that adds the skill: language modelling on learnt text."""

from __future__ import annotations

import torch

from nexus_core.distill.signals import LEARNT_HIDDEN, Signals
from nexus_core.distill.vocabulary import cross_entropy_sum
from nexus_core.types import Strategy


def lm(signals: Signals, parameters: None = None) -> torch.Tensor:
    """Cross entropy of the next token on learnt text, in nats per learnt token of the step.

    Zero if the micro-batch has no learnt token.
    """
    if signals.learnt_hidden is None or signals.learnt_targets is None:
        raise ValueError("lm needs the student's hidden states and the targets of learnt tokens")
    total = cross_entropy_sum(signals.learnt_hidden, signals.learnt_targets, signals.head)
    return total / max(signals.step_tokens.learnt, 1)


STRATEGY = Strategy(
    name="lm",
    function=lm,
    summary="Cross entropy of the next token on learnt sets, nats per token.",
    needs=frozenset({LEARNT_HIDDEN}),
)
