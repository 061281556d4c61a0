"""Losses against their formulas written out in float64, and against themselves cut into pieces."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_core.distill import STRATEGIES, Signals, TokenCounts
from nexus_core.distill.divergence import LOG_NOTHING
from nexus_core.distill.head import OutputHead
from nexus_core.distill.hidden_match import hidden_match
from nexus_core.distill.lm import lm
from nexus_core.distill.logits_kl import LogitsKlParameters, logits_kl
from nexus_core.distill.router_kl import router_kl
from nexus_core.distill.signals import SIGNALS
from nexus_core.distill.teachers import StoredTeacher, WholeTeacher
from nexus_core.distill.vocabulary import cross_entropy_sum, divergence_sum

# N learnt targets, K kept targets, T tokens of text, D hidden size, V vocabulary, E experts, L layers
N, K, T, D, V, E, L = 5, 4, 11, 7, 13, 6, 3
DIRECTIONS = ["forward", "reverse", "jensen_shannon"]


def rows(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEAD = OutputHead(rows(V, D, seed=40) / 3, rows(V, seed=41), 0.5)


def signals(**changes: object) -> Signals:
    given = {
        "head": HEAD,
        "learnt_hidden": rows(N, D, seed=1).requires_grad_(),
        "learnt_targets": torch.arange(N) % V,
        "kept_hidden": rows(K, D, seed=2).requires_grad_(),
        "teacher": WholeTeacher(rows(K, D, seed=3), HEAD),
        "teacher_hidden": rows(K, D, seed=3),
        "router_logits": tuple(rows(T, E, seed=10 + i).requires_grad_() for i in range(L)),
        "teacher_router_logits": tuple(rows(T, E, seed=20 + i) for i in range(L)),
        "step_tokens": TokenCounts(learnt=20, kept=7, text=31),
        "temperature": 2.5,
    }
    return Signals(**(given | changes))


def logits(hidden: torch.Tensor) -> torch.Tensor:
    return HEAD.scale * (hidden @ HEAD.weight.T + HEAD.bias)


def probabilities(logits_TX: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    exponentials = torch.exp(logits_TX / temperature)
    return exponentials / exponentials.sum(1, keepdim=True)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum over rows of sum_x p(x) (log p(x) - log q(x)), from the definition."""
    return (p * (p.log() - q.log())).sum()


def obvious_divergence(teacher: torch.Tensor, student: torch.Tensor, direction: str) -> torch.Tensor:
    """Of probabilities, from the definitions."""
    if direction == "forward":
        return kl(teacher, student)
    if direction == "reverse":
        return kl(student, teacher)
    mean = (teacher + student) / 2
    return (kl(teacher, mean) + kl(student, mean)) / 2


def assert_same_value_and_gradient(
    loss: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor, tolerance: float = 1e-10
) -> None:
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(loss, inputs)
    for own, right in zip(ours, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(own, right, rtol=tolerance, atol=tolerance)


def test_lm_is_mean_cross_entropy_over_the_steps_learnt_tokens() -> None:
    given = signals()
    found = probabilities(logits(given.learnt_hidden))
    expected = -sum(found[i, i % V].log() for i in range(N)) / 20
    assert_same_value_and_gradient(lm(given), expected, given.learnt_hidden)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_kl_is_a_divergence_from_the_base_over_the_steps_kept_tokens(direction: str, temperature: float) -> None:
    given = signals()
    loss = logits_kl(given, LogitsKlParameters(direction=direction, temperature=temperature))
    teacher = probabilities(logits(given.teacher_hidden), temperature)
    student = probabilities(logits(given.kept_hidden), temperature)
    expected = temperature**2 * obvious_divergence(teacher, student, direction) / 7
    assert_same_value_and_gradient(loss, expected, given.kept_hidden)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_stored_teacher_is_compared_over_what_is_stored_and_any_other(direction: str) -> None:
    """Three stored ids, then two and a filler, then all but one of the vocabulary."""
    given = signals()
    whole = probabilities(logits(given.teacher_hidden))
    kept = [[1, 4, 9], [0, 12], list(range(12)), [7]]
    ids = torch.tensor([row + [row[0]] * (12 - len(row)) for row in kept])
    logs = torch.full((K, 12), LOG_NOTHING, dtype=torch.float64)
    for number, row in enumerate(kept):
        logs[number, : len(row)] = whole[number, row].log()
    tails = torch.stack([1 - whole[number, row].sum() for number, row in enumerate(kept)])
    loss = logits_kl(signals(teacher=StoredTeacher(ids, logs, tails.log()), kept_hidden=given.kept_hidden),
                     LogitsKlParameters(direction=direction))  # fmt: skip

    student = probabilities(logits(given.kept_hidden))
    expected = torch.zeros((), dtype=torch.float64)
    for number, row in enumerate(kept):
        others = [x for x in range(V) if x not in row]
        p = torch.cat([whole[number, row], whole[number, others].sum(0, keepdim=True)])
        q = torch.cat([student[number, row], student[number, others].sum(0, keepdim=True)])
        expected = expected + obvious_divergence(p, q, direction) / 7
    assert_same_value_and_gradient(loss, expected, given.kept_hidden)


def test_logits_kl_does_not_follow_the_schedules_temperature() -> None:
    assert logits_kl(signals(temperature=9.0)) == logits_kl(signals(temperature=1.0))


def test_router_kl_is_the_mean_over_layers_at_the_schedules_temperature() -> None:
    given = signals()
    pairs = zip(given.teacher_router_logits, given.router_logits, strict=True)
    total = sum(kl(probabilities(teacher, 2.5), probabilities(student, 2.5)) for teacher, student in pairs)
    # its sums are float32
    assert_same_value_and_gradient(router_kl(given), 2.5**2 * total / L / 31, *given.router_logits, tolerance=1e-5)


def test_hidden_match_is_the_squared_distance_relative_to_the_bases_length() -> None:
    given = signals()
    student, teacher = given.kept_hidden, given.teacher_hidden
    expected = sum((student[i] - teacher[i]).norm() ** 2 / teacher[i].norm() ** 2 for i in range(K)) / 7
    assert_same_value_and_gradient(hidden_match(given), expected, student, tolerance=1e-5)
    assert hidden_match(signals(kept_hidden=teacher)) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(direction: str) -> None:
    same = rows(K, D, seed=3).float().requires_grad_()
    head = OutputHead(HEAD.weight.float())
    loss = divergence_sum(same, WholeTeacher(same.detach(), head), head, direction)
    assert abs(loss) < 1e-6
    assert loss == 0 or direction == "jensen_shannon"
    (gradient,) = torch.autograd.grad(loss, same)
    assert gradient.abs().max() < 1e-6


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step() -> None:
    whole = signals()
    first = signals(
        learnt_hidden=whole.learnt_hidden[:2],
        learnt_targets=whole.learnt_targets[:2],
        kept_hidden=whole.kept_hidden[:0],
        teacher=WholeTeacher(whole.teacher_hidden[:0], HEAD),
        teacher_hidden=whole.teacher_hidden[:0],
        router_logits=tuple(layer[:4] for layer in whole.router_logits),
        teacher_router_logits=tuple(layer[:4] for layer in whole.teacher_router_logits),
    )
    second = signals(
        learnt_hidden=whole.learnt_hidden[2:],
        learnt_targets=whole.learnt_targets[2:],
        router_logits=tuple(layer[4:] for layer in whole.router_logits),
        teacher_router_logits=tuple(layer[4:] for layer in whole.teacher_router_logits),
    )
    for strategy in STRATEGIES:
        total = strategy.function(first, None) + strategy.function(second, None)
        torch.testing.assert_close(total, strategy.function(whole, None), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [lm, logits_kl, hidden_match])
def test_a_micro_batch_without_tokens_of_a_kind_adds_nothing_and_can_be_differentiated(loss) -> None:
    empty = torch.zeros(0, D, requires_grad=True, dtype=torch.float64)
    none = signals(
        learnt_hidden=empty,
        learnt_targets=torch.zeros(0, dtype=torch.long),
        kept_hidden=empty,
        teacher=WholeTeacher(empty.detach(), HEAD),
        teacher_hidden=empty.detach(),
        step_tokens=TokenCounts(0, 0, 0),
    )
    value = loss(none)
    assert value == 0
    value.backward()


def test_losses_are_float32_for_bfloat16_hidden_states() -> None:
    head = OutputHead(HEAD.weight.bfloat16())
    hidden = rows(N, D, seed=1).bfloat16().requires_grad_()
    loss = cross_entropy_sum(hidden, torch.arange(N), head)
    assert loss.dtype == torch.float32
    found = (hidden @ head.weight.T).double().log_softmax(-1)
    assert math.isclose(loss.item(), -sum(found[i, i] for i in range(N)), rel_tol=1e-5)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chunks_give_the_same_sum_and_gradient(direction: str) -> None:
    student, teacher = rows(37, D, seed=1).requires_grad_(), WholeTeacher(rows(37, D, seed=2), HEAD)
    whole = divergence_sum(student, teacher, HEAD, direction, 1.5)
    cut = divergence_sum(student, teacher, HEAD, direction, 1.5, chunk_elements=5 * V)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (cut, whole)))


def test_a_gradient_from_above_scales_that_of_the_hidden_states() -> None:
    hidden = rows(N, D, seed=1).requires_grad_()
    (once,) = torch.autograd.grad(cross_entropy_sum(hidden, torch.arange(N), HEAD), hidden)
    (thrice,) = torch.autograd.grad(3 * cross_entropy_sum(hidden, torch.arange(N), HEAD), hidden)
    torch.testing.assert_close(thrice, 3 * once)


def test_a_teacher_of_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the teacher knows 3 tokens, the student 4"):
        divergence_sum(rows(4, D, seed=1), WholeTeacher(rows(3, D, seed=2), HEAD), HEAD)


def test_every_loss_says_what_it_needs() -> None:
    assert [strategy.name for strategy in STRATEGIES] == ["lm", "router_kl", "logits_kl", "hidden_match"]
    for strategy in STRATEGIES:
        assert strategy.needs
        assert strategy.needs <= SIGNALS
