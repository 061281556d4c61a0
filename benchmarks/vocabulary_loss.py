"""KL to the base over a vocabulary of 201,088, value and gradient, against all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.measurement import AnonymousMemory, Measurement, interleaved
from nexus_core.distill.head import OutputHead
from nexus_core.distill.teachers import WholeTeacher
from nexus_core.distill.vocabulary import divergence_sum

# A hidden size of 512 keeps a round in seconds; gpt-oss's 2880 makes the products, which both sides share, weigh more.
TOKENS, HIDDEN, VOCABULARY = 1024, 512, 201_088
ROUNDS = 3


def run() -> list[Measurement]:
    """Time and peak anonymous memory relative to float32 logits of student and teacher held whole."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    student = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    teacher = (student + torch.randn(TOKENS, HIDDEN, generator=generator) / 10).detach()
    head = OutputHead(weight)

    def whole() -> torch.Tensor:
        ours = functional.log_softmax(student @ weight.T, dim=-1)
        with torch.no_grad():
            theirs = functional.log_softmax(teacher @ weight.T, dim=-1)
        loss = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
        return torch.autograd.grad(loss, student)[0]

    def chunked() -> torch.Tensor:
        return torch.autograd.grad(divergence_sum(student, WholeTeacher(teacher, head), head), student)[0]

    torch.testing.assert_close(chunked(), whole(), rtol=1e-3, atol=1e-5)
    subjects: dict[str, Callable[[], torch.Tensor]] = {"all logits at once": whole, "head fused in, in chunks": chunked}
    peaks = {}
    for name, subject in subjects.items():
        with AnonymousMemory() as memory:
            subject()
        peaks[name] = memory.peak_bytes
    seconds = interleaved(subjects, rounds=ROUNDS)
    reference = next(iter(subjects))
    return [
        Measurement(
            "vocabulary_loss",
            name,
            seconds[name],
            seconds[name] / seconds[reference],
            reference,
            f"{peak / 1e6:,.0f} MB, 1/{peaks[reference] / peak:.1f}",
        )
        for name, peak in peaks.items()
    ]
