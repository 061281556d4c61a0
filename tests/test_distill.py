"""Losses against their formulas written out in float64, and against themselves cut into pieces."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_core.distill import STRATEGIES, Signals, TokenCounts
from nexus_core.distill.chunks import sum_over_tokens
from nexus_core.distill.lm import lm
from nexus_core.distill.logits_kl import LogitsKlParameters, divergence, logits_kl
from nexus_core.distill.router_kl import router_kl
from nexus_core.distill.signals import SIGNALS

# N learnt targets, K kept targets, T tokens of text, V vocabulary, E experts, L layers
N, K, T, V, E, L = 5, 4, 11, 13, 6, 3


def rows(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signals(**changes: object) -> Signals:
    given = {
        "learnt_logits": rows(N, V, seed=1).requires_grad_(),
        "learnt_targets": torch.arange(N) % V,
        "kept_logits": rows(K, V, seed=2).requires_grad_(),
        "teacher_logits": rows(K, V, seed=3),
        "router_logits": tuple(rows(T, E, seed=10 + i).requires_grad_() for i in range(L)),
        "teacher_router_logits": tuple(rows(T, E, seed=20 + i) for i in range(L)),
        "step_tokens": TokenCounts(learnt=20, kept=7, text=31),
        "temperature": 2.5,
    }
    return Signals(**(given | changes))


def obvious_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over rows of sum_x p(x) (log p(x) - log q(x)), from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for teacher_row, student_row in zip(teacher, student, strict=True):
        p = torch.exp(teacher_row / temperature) / torch.exp(teacher_row / temperature).sum()
        q = torch.exp(student_row / temperature) / torch.exp(student_row / temperature).sum()
        total = total + (p * (p.log() - q.log())).sum()
    return total


def assert_same_value_and_gradient(loss: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    ours = torch.autograd.grad(loss, inputs)
    for own, right in zip(ours, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-7)


def test_lm_is_mean_cross_entropy_over_the_steps_learnt_tokens() -> None:
    given = signals()
    logits = given.learnt_logits
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    expected = -sum(probabilities[i, i % V].log() for i in range(N)) / 20
    assert_same_value_and_gradient(lm(given), expected, logits)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_kl_is_base_against_student_over_the_steps_kept_tokens(temperature: float) -> None:
    given = signals()
    loss = logits_kl(given, LogitsKlParameters(temperature=temperature))
    expected = temperature**2 * obvious_kl(given.teacher_logits, given.kept_logits, temperature) / 7
    assert_same_value_and_gradient(loss, expected, given.kept_logits)


def test_logits_kl_does_not_follow_the_schedules_temperature() -> None:
    assert logits_kl(signals(temperature=9.0)) == logits_kl(signals(temperature=1.0))


def test_router_kl_is_the_mean_over_layers_at_the_schedules_temperature() -> None:
    given = signals()
    pairs = zip(given.teacher_router_logits, given.router_logits, strict=True)
    expected = sum(2.5**2 * obvious_kl(teacher, student, 2.5) for teacher, student in pairs) / L / 31
    assert_same_value_and_gradient(router_kl(given), expected, *given.router_logits)


def test_kl_of_a_student_that_is_its_teacher_is_exactly_zero_and_so_is_its_gradient() -> None:
    same = rows(K, V, seed=3).float().requires_grad_()
    loss = logits_kl(signals(kept_logits=same, teacher_logits=same.detach()))
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, same)
    assert gradient.abs().max() < 1e-6


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step() -> None:
    whole = signals()
    first = signals(
        learnt_logits=whole.learnt_logits[:2],
        learnt_targets=whole.learnt_targets[:2],
        kept_logits=whole.kept_logits[:0],
        teacher_logits=whole.teacher_logits[:0],
        router_logits=tuple(layer[:4] for layer in whole.router_logits),
        teacher_router_logits=tuple(layer[:4] for layer in whole.teacher_router_logits),
    )
    second = signals(
        learnt_logits=whole.learnt_logits[2:],
        learnt_targets=whole.learnt_targets[2:],
        router_logits=tuple(layer[4:] for layer in whole.router_logits),
        teacher_router_logits=tuple(layer[4:] for layer in whole.teacher_router_logits),
    )
    for strategy in STRATEGIES:
        total = strategy.function(first, None) + strategy.function(second, None)
        torch.testing.assert_close(total, strategy.function(whole, None), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [lm, logits_kl])
def test_a_micro_batch_without_tokens_of_a_kind_adds_nothing_and_can_be_differentiated(loss) -> None:
    empty = torch.zeros(0, V, requires_grad=True)
    none = signals(
        learnt_logits=empty,
        learnt_targets=torch.zeros(0, dtype=torch.long),
        kept_logits=empty,
        teacher_logits=empty.detach(),
        step_tokens=TokenCounts(0, 0, 0),
    )
    value = loss(none)
    assert value == 0
    value.backward()


def test_losses_are_float32_for_bfloat16_logits() -> None:
    given = signals(learnt_logits=rows(N, V, seed=1).bfloat16())
    assert lm(given).dtype == torch.float32
    exact = lm(signals(learnt_logits=rows(N, V, seed=1).bfloat16().double()))
    assert math.isclose(lm(given), exact, rel_tol=1e-6)


def test_chunks_give_the_same_sum_and_gradient() -> None:
    student, teacher = rows(37, V, seed=1).float().requires_grad_(), rows(37, V, seed=2).float()

    def function(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return divergence(ours, theirs, 1.5)

    whole = sum_over_tokens(function, student, teacher)
    cut = sum_over_tokens(function, student, teacher, chunk_elements=5 * V)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (cut, whole)))


def test_every_loss_says_what_it_needs() -> None:
    assert [strategy.name for strategy in STRATEGIES] == ["lm", "router_kl", "logits_kl"]
    for strategy in STRATEGIES:
        assert strategy.needs
        assert strategy.needs <= SIGNALS
