"""A teacher's distribution over the vocabulary, whole or stored; losses never know which they get.

# K kept tokens, C of them in one chunk, D hidden size, V vocabulary, M stored tokens of the vocabulary at most
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nexus_core.distill.divergence import LOG_NOTHING, Direction, divergence
from nexus_core.distill.head import OutputHead


class Teacher(Protocol):
    """What a loss may ask of a teacher of K tokens."""

    def __len__(self) -> int: ...

    def compare(
        self, log_student_CV: torch.Tensor, chunk: slice, direction: Direction, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence summed over a chunk of the tokens, and its gradient (C, V) by student's logits / temperature.

        log_student_CV: the student's log-probabilities at that temperature; overwritten.
        """
        ...


@dataclass(frozen=True)
class WholeTeacher:
    """Every logit of the teacher, computed from its final hidden states (K, D) a chunk at a time."""

    hidden: torch.Tensor
    head: OutputHead

    def __len__(self) -> int:
        return len(self.hidden)

    def compare(
        self, log_student_CV: torch.Tensor, chunk: slice, direction: Direction, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return divergence(log_student_CV, log_probabilities(self.hidden[chunk], self.head, temperature), direction)


@dataclass(frozen=True)
class StoredTeacher:
    """The likeliest tokens of the vocabulary, and what is left over for all others together.

    ids (K, M) int64; log_probabilities (K, M); log_tail (K,). A token with fewer than M has its first id again, with
    a log-probability of LOG_NOTHING. The divergence is between distributions over the stored tokens and "any other",
    which is what is known of the teacher; its gradient on the others follows the student's own shares of them.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor
    log_tail: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def compare(
        self, log_student_CV: torch.Tensor, chunk: slice, direction: Direction, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if temperature != 1.0:
            raise ValueError(f"a stored teacher is known at temperature 1, not {temperature:g}")
        ids_CM, dtype = self.ids[chunk], log_student_CV.dtype
        log_teacher_CM = self.log_probabilities[chunk].to(dtype)
        is_filler_CM = log_teacher_CM <= LOG_NOTHING
        log_top_CM = log_student_CV.gather(-1, ids_CM).masked_fill_(is_filler_CM, LOG_NOTHING)
        others_CV = log_student_CV.exp_().scatter_(-1, ids_CM, 0.0)
        others_C1 = others_CV.sum(dim=-1, keepdim=True).clamp_min_(torch.finfo(dtype).tiny)
        value, gradient_CX = divergence(
            torch.cat([log_top_CM, others_C1.log()], dim=-1),
            torch.cat([log_teacher_CM, self.log_tail[chunk, None].to(dtype)], dim=-1),
            direction,
        )
        gradient_CV = others_CV.mul_(gradient_CX[:, -1:] / others_C1)
        return value, gradient_CV.scatter_add_(-1, ids_CM, gradient_CX[:, :-1])


def log_probabilities(hidden_CD: torch.Tensor, head: OutputHead, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) (C, V), in float32, or in float64 for a float64 head."""
    logits_CV = head.logits(hidden_CD)
    logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    if temperature != 1.0:
        logits_CV = logits_CV / temperature
    return torch.log_softmax(logits_CV, dim=-1)
