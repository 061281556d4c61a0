"""Losses over the vocabulary with the output head fused in: no more than a few chunks of logits ever exist.

The head is frozen, so the only gradient wanted is that of the hidden states, which is small. It is computed together
with the value, a chunk of tokens at a time; the backward pass only scales it. Source of the idea: Liger-Kernel
(arXiv 2410.10989), fused linear cross entropy.

    # T tokens, C of them in one chunk, D hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nexus_core.distill.divergence import Direction
from nexus_core.distill.head import OutputHead
from nexus_core.distill.teachers import Teacher, log_probabilities

# 2**25 float32 numbers are 128 MiB: 166 rows of a vocabulary of 201,088, all rows of a small one. Three such buffers
# exist at once (four for Jensen-Shannon). On an H200 166 rows are enough to be bound by arithmetic: with a head of
# 201,088 x 2,880 in bfloat16 a chunk's product is 0.19 TFLOP, 0.48 ms at 400 TFLOP/s, and reads 1.16 GB, 0.39 ms at
# 3 TB/s.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**25}

# Of the hidden states (C, D) at `chunk`: the summed loss, and its gradient (C, V) by the logits.
ChunkLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy_sum(
    hidden_TD: torch.Tensor, targets_T: torch.Tensor, head: OutputHead, *, chunk_elements: int | None = None
) -> torch.Tensor:
    """Summed cross entropy of the targets, nats; differentiable by the hidden states."""

    def of_chunk(hidden_CD: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_CV, places_C1 = log_probabilities(hidden_CD, head, 1.0), targets_T[chunk, None]
        value = -log_CV.gather(-1, places_C1).sum()
        minus_one_C1 = torch.full_like(places_C1, -1, dtype=log_CV.dtype)
        return value, log_CV.exp_().scatter_add_(-1, places_C1, minus_one_C1)

    return _SumOverTokens.apply(hidden_TD, head, of_chunk, chunk_elements)


def divergence_sum(
    hidden_TD: torch.Tensor,
    teacher: Teacher,
    head: OutputHead,
    direction: Direction = "forward",
    temperature: float = 1.0,
    *,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Summed divergence of the teacher's and the student's next token, nats; differentiable by the hidden states.

    Raises ValueError if the teacher knows another number of tokens.
    """
    if len(teacher) != len(hidden_TD):
        raise ValueError(f"the teacher knows {len(teacher)} tokens, the student {len(hidden_TD)}")

    def of_chunk(hidden_CD: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient_CV = teacher.compare(
            log_probabilities(hidden_CD, head, temperature), chunk, direction, temperature
        )
        return value, gradient_CV if temperature == 1.0 else gradient_CV.div_(temperature)

    return _SumOverTokens.apply(hidden_TD, head, of_chunk, chunk_elements)


class _SumOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, head: OutputHead, of_chunk: ChunkLoss, chunk_elements: int | None
    ) -> torch.Tensor:
        elements = chunk_elements or CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cpu"])
        rows = max(1, elements // head.vocabulary_size)
        gradient_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), rows):
            chunk = slice(start, start + rows)
            value, gradient_CV = of_chunk(hidden_TD[chunk], chunk)
            total += value
            if gradient_TD is not None:
                gradient_TD[chunk] = head.hidden_gradient(gradient_CV)
            # the next chunk must not find this one's buffer still held
            del gradient_CV
        if gradient_TD is not None:
            ctx.save_for_backward(gradient_TD)
        return total if hidden_TD.dtype == torch.float64 else total.float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        return (gradient_TD * outer[0]).to(gradient_TD.dtype), None, None, None
