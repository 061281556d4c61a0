"""The loss that keeps the rest: the student must predict kept text as the base does.

# K kept tokens, V vocabulary
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional

from nexus_core.distill.chunks import sum_over_tokens
from nexus_core.distill.signals import KEPT_LOGITS, TEACHER_LOGITS, Signals
from nexus_core.types import Strategy


class LogitsKlParameters(BaseModel):
    """Settings of `logits_kl`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits; the loss is multiplied by its square."
    )


def logits_kl(signals: Signals, parameters: LogitsKlParameters | None = None) -> torch.Tensor:
    """KL(base || student) of the next token's distribution on kept text, in nats per kept token of the step.

    The temperature is its own parameter, 1 by default, and not the schedule's: what is to be kept is the distribution
    that the model is used with. Zero if the micro-batch has no kept token. Source: Hinton et al. 2015,
    arXiv 1503.02531, for the factor temperature^2.
    """
    temperature = (parameters or LogitsKlParameters()).temperature
    student_KV, teacher_KV = signals.kept_logits, signals.teacher_logits
    if student_KV is None or teacher_KV is None:
        raise ValueError("logits_kl needs the student's and the teacher's logits of kept tokens")
    total = sum_over_tokens(partial(divergence, temperature=temperature), student_KV, teacher_KV)
    return temperature**2 * total / max(signals.step_tokens.kept, 1)


def divergence(student_TX: torch.Tensor, teacher_TX: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over rows of KL(softmax(teacher / temperature) || softmax(student / temperature)), nats, in float32."""
    student = functional.log_softmax(student_TX.float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_TX.float() / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


STRATEGY = Strategy(
    name="logits_kl",
    function=logits_kl,
    summary="KL of the vocabulary distribution to the base on kept sets, nats per token.",
    parameters=LogitsKlParameters,
    needs=frozenset({KEPT_LOGITS, TEACHER_LOGITS}),
)
