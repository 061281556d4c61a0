"""Measures against slow, obvious versions of themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from nexus_core.distill.head import OutputHead
from nexus_core.measure.perplexity import Perplexity, perplexity
from nexus_core.measure.router_health import RouterHealth
from nexus_core.measure.verdict import Change, judge


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_perplexity_is_that_of_a_loop_over_tokens() -> None:
    logits, targets = 2 * random(3, 5, 7, seed=0), torch.randint(0, 7, (3, 5))
    targets[0, :2] = targets[2, 4] = -100
    total, tokens = 0.0, 0
    for b in range(3):
        for s in range(5):
            if targets[b, s] != -100:
                scores = [math.exp(score) for score in logits[b, s].tolist()]
                total -= math.log(scores[targets[b, s]] / sum(scores))
                tokens += 1
    measured = perplexity(logits.flatten(0, 1), targets.flatten(), OutputHead(torch.eye(7)))
    assert measured.tokens == tokens == 12
    assert measured.nll_nats_per_token == pytest.approx(total / tokens, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)


def test_perplexity_adds_up_over_batches() -> None:
    logits, targets = random(4, 6, 9, seed=1), torch.randint(0, 9, (4, 6))
    hidden, targets, head = logits.flatten(0, 1), targets.flatten(), OutputHead(torch.eye(9))
    parts = perplexity(hidden[:5], targets[:5], head) + perplexity(hidden[5:], targets[5:], head)
    assert parts.tokens == 24
    assert parts.nll_nats == pytest.approx(perplexity(hidden, targets, head).nll_nats)


def test_perplexity_holds_logits_of_a_chunk_only(monkeypatch) -> None:
    hidden, weight = random(50, 8, seed=2), random(300, 8, seed=3)
    targets = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(4))
    targets[::7] = -100
    head, held = OutputHead(weight, random(300, seed=5), scale=0.5), []

    def logits(self: OutputHead, hidden_CD: torch.Tensor) -> torch.Tensor:
        held.append(len(hidden_CD))
        return 0.5 * (hidden_CD @ weight.T + head.bias)

    expected = functional.cross_entropy(logits(head, hidden).double(), targets, reduction="sum")
    whole = perplexity(hidden, targets, head)
    held.clear()
    monkeypatch.setattr(OutputHead, "logits", logits)
    chunked = perplexity(hidden, targets, head, chunk_elements=4 * 300)
    assert max(held) == 4
    assert sum(held) == whole.tokens == chunked.tokens == 42
    assert chunked.nll_nats == pytest.approx(whole.nll_nats, rel=1e-7) == pytest.approx(float(expected), rel=1e-6)


def test_perplexity_of_nothing_is_not_a_number_and_of_nonsense_infinite() -> None:
    assert math.isnan(Perplexity().perplexity)
    assert Perplexity(nll_nats=10_000.0, tokens=1).perplexity == math.inf
    assert math.isnan(Perplexity(nll_nats=math.nan, tokens=1).perplexity)


def test_router_health_is_that_of_a_loop_over_tokens() -> None:
    student = [2 * random(10, 6, seed=layer) for layer in range(3)]
    base = [2 * random(10, 6, seed=10 + layer) for layer in range(3)]
    health = RouterHealth()
    health.update([layer[:4] for layer in student], [layer[:4] for layer in base])
    health.update([layer[4:] for layer in student], [layer[4:] for layer in base])
    for i in range(3):
        entropy = base_entropy = l1 = 0.0
        for t in range(10):
            p, q = (torch.softmax(logits[i][t].double(), 0).tolist() for logits in (student, base))
            entropy -= sum(x * math.log(x) for x in p) / 10
            base_entropy -= sum(x * math.log(x) for x in q) / 10
            l1 += sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 10
        assert health.entropy[i].item() == pytest.approx(entropy, rel=1e-5)
        assert health.base_entropy[i].item() == pytest.approx(base_entropy, rel=1e-5)
        assert health.l1[i].item() == pytest.approx(l1, rel=1e-5)
    assert health.summary() == {
        "router_entropy": pytest.approx(health.entropy.mean().item()),
        "router_entropy_base": pytest.approx(health.base_entropy.mean().item()),
        "router_l1": pytest.approx(health.l1.mean().item()),
    }


def test_router_health_without_a_base_says_nothing_about_it() -> None:
    health = RouterHealth()
    health.update([torch.zeros(5, 8)])
    assert health.summary() == {"router_entropy": pytest.approx(math.log(8))}


def test_routers_that_agree_on_nothing_are_at_distance_two() -> None:
    health = RouterHealth()
    health.update([torch.tensor([[100.0, 0.0]])], [torch.tensor([[0.0, 100.0]])])
    assert health.l1.item() == pytest.approx(2.0)


def change(base: float, student: float) -> Change:
    return Change(Perplexity(math.log(base), 1), Perplexity(math.log(student), 1))


@pytest.mark.parametrize(
    ("domain", "general", "gained", "retained", "short"),
    [
        (8.0, 10.4, True, True, "gained and retained"),
        (8.0, 10.6, True, False, "gained but forgot"),
        (10.0, 10.0, False, True, "retained but gained nothing"),
        (10.1, 11.0, False, False, "forgot and gained nothing"),
        (math.nan, math.nan, False, False, "forgot and gained nothing"),
    ],
)
def test_verdict(domain: float, general: float, gained: bool, retained: bool, short: str) -> None:
    verdict = judge({"general": change(10, general), "domain": change(10, domain)}, ["domain"], 0.05)
    assert (verdict.gained, verdict.retained, verdict.short) == (gained, retained, short)
    assert verdict.text.index("domain") < verdict.text.index("general")


def test_every_kept_set_must_be_retained_and_every_learnt_one_gain() -> None:
    sets = {"a": change(10, 9), "b": change(10, 11), "c": change(10, 10)}
    assert judge(sets, ["a"], 0.05).retained is False
    assert judge(sets, ["a", "b"], 0.05).gained is False


def test_a_verdict_over_kept_sets_alone_says_nothing_of_gain() -> None:
    verdict = judge({"general": change(10, 10)}, [], 0.05)
    assert (verdict.gained, verdict.retained, verdict.short) == (None, True, "retained")
