"""What a student and its teacher say about one micro-batch: all that a loss may look at.

A loss never learns where the teacher's numbers came from (the same weights with the additions off, or a file), nor how
the step was cut into micro-batches.

    # T tokens of text, N targets of learnt sets, K targets of kept sets (N + K <= T), V vocabulary, E experts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What a loss may need, for `Strategy.needs`: what no loss of a run needs is not computed.
LEARNT_LOGITS = "learnt_logits"
KEPT_LOGITS = "kept_logits"
TEACHER_LOGITS = "teacher_logits"
ROUTER_LOGITS = "router_logits"
TEACHER_ROUTER_LOGITS = "teacher_router_logits"
SIGNALS = frozenset({LEARNT_LOGITS, KEPT_LOGITS, TEACHER_LOGITS, ROUTER_LOGITS, TEACHER_ROUTER_LOGITS})


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

    learnt_logits: the student's, for targets of learnt sets (N, V); learnt_targets: those targets (N,). kept_logits,
    teacher_logits: the student's and the base's, for targets of kept sets (K, V). router_logits,
    teacher_router_logits: one (T, E) per MoE layer, of all text, before top-k. step_tokens: of the whole optimizer
    step, all its micro-batches together; a loss divides its sum by one of them, so that the step's gradient does not
    depend on how it was cut. temperature: of the step's schedule.
    """

    learnt_logits: torch.Tensor | None
    learnt_targets: torch.Tensor | None
    kept_logits: torch.Tensor | None
    teacher_logits: torch.Tensor | None
    router_logits: tuple[torch.Tensor, ...]
    teacher_router_logits: tuple[torch.Tensor, ...]
    step_tokens: TokenCounts
    temperature: float = 1.0
