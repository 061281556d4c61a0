"""The loss that keeps the routing: routers must see tokens as the base's routers do.

It acts on a frozen router too: shared experts of lower layers change what the routers above them read.

    # T tokens, E experts
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nexus_core.distill.signals import ROUTER_LOGITS, TEACHER_ROUTER_LOGITS, Signals
from nexus_core.types import Strategy


def router_kl(signals: Signals, parameters: None = None) -> torch.Tensor:
    """temperature^2 KL(teacher || student) of the full router softmax, mean over layers, nats per token of the step.

    All text, of learnt and kept sets alike, prompts too; temperature: the schedule's. Source: Hinton et al. 2015,
    arXiv 1503.02531.
    """
    student_TE, teacher_TE = signals.router_logits, signals.teacher_router_logits
    if not student_TE or len(student_TE) != len(teacher_TE):
        raise ValueError(
            f"router_kl needs both models' router logits, got {len(student_TE)} and {len(teacher_TE)} layers"
        )
    total = torch.stack(
        [kl_sum(ours, theirs, signals.temperature) for ours, theirs in zip(student_TE, teacher_TE, strict=True)]
    ).mean()
    return signals.temperature**2 * total / max(signals.step_tokens.text, 1)


def kl_sum(student_TE: torch.Tensor, teacher_TE: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over tokens of KL(softmax(teacher / temperature) || softmax(student / temperature)), nats, in float32."""
    student = functional.log_softmax(student_TE.float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_TE.float() / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


STRATEGY = Strategy(
    name="router_kl",
    function=router_kl,
    summary="KL of the full router softmax to the base's on all text at the schedule's temperature, mean over layers.",
    needs=frozenset({ROUTER_LOGITS, TEACHER_ROUTER_LOGITS}),
)
