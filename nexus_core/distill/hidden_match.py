"""A loss that keeps more than what the model says: the final hidden states of kept text must stay the base's.

# K kept tokens, D hidden size
"""

from __future__ import annotations

import torch

from nexus_core.distill.signals import KEPT_HIDDEN, TEACHER_HIDDEN, Signals
from nexus_core.types import Strategy


def hidden_match(signals: Signals, parameters: None = None) -> torch.Tensor:
    """|student - base|^2 / |base|^2 of the final hidden states on kept text, mean over the step's kept tokens.

    0 is the base; 2 is as far as two random directions of one length. Zero if the micro-batch has no kept token.
    """
    student_KD, teacher_KD = signals.kept_hidden, signals.teacher_hidden
    if student_KD is None or teacher_KD is None:
        raise ValueError("hidden_match needs the student's and the base's hidden states of kept tokens")
    teacher_KD = teacher_KD.float()
    distance_K = (student_KD.float() - teacher_KD).square().sum(dim=-1)
    length_K = teacher_KD.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (distance_K / length_K).sum() / max(signals.step_tokens.kept, 1)


STRATEGY = Strategy(
    name="hidden_match",
    function=hidden_match,
    summary="Squared distance of the final hidden states to the base's on kept sets, relative to their own length.",
    needs=frozenset({KEPT_HIDDEN, TEACHER_HIDDEN}),
)
