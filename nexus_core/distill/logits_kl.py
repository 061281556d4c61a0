"""The loss that keeps the rest: the student must predict kept text as the base does."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.distill.divergence import Direction
from nexus_core.distill.signals import KEPT_HIDDEN, TEACHER, Signals
from nexus_core.distill.vocabulary import divergence_sum
from nexus_core.types import Strategy


class LogitsKlParameters(BaseModel):
    """Settings of `logits_kl`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    direction: Direction = Field(
        "forward",
        description="`forward` is KL(base || student) and covers all that the base may say; `reverse` is "
        "KL(student || base) and forbids what it would not; `jensen_shannon` is between them and at most ln 2.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits; the loss is multiplied by its square."
    )


def logits_kl(signals: Signals, parameters: LogitsKlParameters | None = None) -> torch.Tensor:
    """Divergence of the next token's distribution from the base's on kept text, nats per kept token of the step.

    The temperature is its own parameter, 1 by default, and not the schedule's: what is to be kept is the distribution
    that the model is used with. Zero if the micro-batch has no kept token. Source: Hinton et al. 2015,
    arXiv 1503.02531, for the factor temperature^2; Agarwal et al. 2024, arXiv 2306.13649, for the directions.
    """
    settings = parameters or LogitsKlParameters()
    if signals.kept_hidden is None or signals.teacher is None:
        raise ValueError("logits_kl needs the student's hidden states of kept tokens, and a teacher")
    total = divergence_sum(signals.kept_hidden, signals.teacher, signals.head, settings.direction, settings.temperature)
    return settings.temperature**2 * total / max(signals.step_tokens.kept, 1)


STRATEGY = Strategy(
    name="logits_kl",
    function=logits_kl,
    summary="KL of the vocabulary distribution to the base on kept sets, nats per token.",
    parameters=LogitsKlParameters,
    needs=frozenset({KEPT_HIDDEN, TEACHER}),
)
