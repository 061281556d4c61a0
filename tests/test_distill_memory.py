"""How many tensors as wide as the vocabulary the losses hold at once: what estimates of memory count on."""

from __future__ import annotations

import pytest
import torch
from live_tensors import LiveTensors

from nexus_core.distill.head import OutputHead
from nexus_core.distill.teachers import WholeTeacher
from nexus_core.distill.vocabulary import cross_entropy_sum, divergence_sum

# T tokens, C of them in one chunk, D hidden size, V vocabulary
T, C, D, V = 64, 16, 8, 4096


def rows(number: int, *, seed: int) -> torch.Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed)).bfloat16()


HEAD, TEACHER, TARGETS = OutputHead(rows(V, seed=0)), rows(T, seed=2), torch.arange(T)


def test_cross_entropy_holds_two_chunks_in_float32() -> None:
    hidden = rows(T, seed=1).requires_grad_()
    with LiveTensors() as live:
        cross_entropy_sum(hidden, TARGETS, HEAD, chunk_elements=C * V).backward()
    assert live.peak_bytes == pytest.approx(4 * C * V * 2, rel=0.01)


@pytest.mark.parametrize(("direction", "chunks"), [("forward", 3), ("reverse", 3), ("jensen_shannon", 4)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_divergence_holds_three_chunks_in_float32_or_four(direction, chunks, temperature) -> None:
    hidden, teacher = rows(T, seed=1).requires_grad_(), WholeTeacher(TEACHER, HEAD)
    with LiveTensors() as live:
        divergence_sum(hidden, teacher, HEAD, direction, temperature, chunk_elements=C * V).backward()
    assert live.peak_bytes == pytest.approx(4 * C * V * chunks, rel=0.01)
