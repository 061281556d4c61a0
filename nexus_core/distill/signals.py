"""What a student and its teacher say about one micro-batch: all that a loss may look at.

A loss never learns where the teacher's numbers came from (the same weights with the additions off, or a file), nor how
the step was cut into micro-batches. Logits of the whole vocabulary are never among them, because they are the widest
thing in a step: losses get the hidden states that the output head reads, and the head.

    # T tokens of text, N targets of learnt sets, K targets of kept sets (N + K <= T), D hidden size, E experts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nexus_core.distill.head import OutputHead
from nexus_core.distill.teachers import Teacher

# What a loss may need, for `Strategy.needs`: what no loss of a run needs is not computed.
LEARNT_HIDDEN = "learnt_hidden"
KEPT_HIDDEN = "kept_hidden"
TEACHER = "teacher"
TEACHER_HIDDEN = "teacher_hidden"
ROUTER_LOGITS = "router_logits"
TEACHER_ROUTER_LOGITS = "teacher_router_logits"
OF_THE_TEACHER = frozenset({TEACHER, TEACHER_HIDDEN, TEACHER_ROUTER_LOGITS})
SIGNALS = OF_THE_TEACHER | {LEARNT_HIDDEN, KEPT_HIDDEN, ROUTER_LOGITS}


@dataclass(frozen=True)
class TokenCounts:
    """Tokens by what they are for.

    learnt, kept: targets that count, of sets to learn from and of sets to keep; not prompts, not padding. text: all
    tokens that a router reads, prompts included, padding not.
    """

    learnt: int
    kept: int
    text: int


@dataclass(frozen=True)
class Signals:
    """A micro-batch as the losses see it; what no loss needs is None or empty.

    head: gives logits from hidden states. learnt_hidden (N, D): the student's final hidden states where targets of
    learnt sets are predicted; learnt_targets (N,): those targets. kept_hidden (K, D): the student's, for targets of
    kept sets; teacher: the next token's distribution there; teacher_hidden (K, D): the base's hidden states.
    router_logits, teacher_router_logits: one (T, E) per MoE layer, of all text, before top-k. step_tokens: of the
    whole optimizer step, all its micro-batches together; a loss divides its sum by one of them, so that the step's
    gradient does not depend on how it was cut. temperature: of the step's schedule.
    """

    head: OutputHead
    learnt_hidden: torch.Tensor | None
    learnt_targets: torch.Tensor | None
    kept_hidden: torch.Tensor | None
    teacher: Teacher | None
    teacher_hidden: torch.Tensor | None
    router_logits: tuple[torch.Tensor, ...]
    teacher_router_logits: tuple[torch.Tensor, ...]
    step_tokens: TokenCounts
    temperature: float = 1.0
