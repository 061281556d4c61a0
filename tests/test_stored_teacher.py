"""Stored teachers: codes that give back what went in, within stated bounds and bytes, whatever the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_core.distill import id_sets, stored_logits, stored_routers
from nexus_core.distill.divergence import LOG_NOTHING
from nexus_core.distill.router_kl import kl_sum

GPT_VOCABULARY = 201_088


def zipf_like(tokens: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Log-probabilities (T, V) that fall with a power of the rank, as those of language models do; some tokens are
    nearly certain, others wide open.
    """
    generator = torch.Generator().manual_seed(seed)
    log_ranks = torch.arange(1, vocabulary + 1).float().log()
    rows = []
    for _ in range(tokens):
        slope = torch.empty(()).uniform_(1.0, 2.6, generator=generator)
        noise = torch.randn(vocabulary, generator=generator) / 2
        rows.append((noise - slope * log_ranks)[torch.randperm(vocabulary, generator=generator)])
    return torch.log_softmax(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 2048, GPT_VOCABULARY, 2**18])
def test_sets_of_ids_come_back_in_the_bytes_that_were_told(vocabulary: int) -> None:
    generator = np.random.default_rng(0)
    counts = np.array([count for count in (1, 3, 1, 50, 128) if count <= vocabulary])
    sets = [np.sort(generator.choice(vocabulary, count, replace=False)) for count in counts]
    sets[0] = np.array([vocabulary - 1])  # the largest there is
    ids = np.concatenate(sets)
    data = np.frombuffer(id_sets.encode(ids, counts, vocabulary), dtype=np.uint8)
    assert len(data) == id_sets.coded_bytes(counts, vocabulary)
    assert np.array_equal(id_sets.decode(data, counts, vocabulary), ids)


def test_an_id_takes_no_more_than_two_bits_above_what_its_place_is_worth() -> None:
    counts = np.full(100, 50)
    assert id_sets.coded_bytes(counts, GPT_VOCABULARY) * 8 / 5000 < 2 + np.log2(GPT_VOCABULARY / 50) + 0.1


@pytest.mark.parametrize(("vocabulary", "tokens"), [(2048, 200), (GPT_VOCABULARY, 40)])
def test_a_hundred_and_twenty_bytes_a_token_keep_the_distribution(vocabulary: int, tokens: int) -> None:
    top = stored_logits.choose(zipf_like(tokens, vocabulary), limit=128, tail=0.005)
    fitted = stored_logits.fitted(top, vocabulary, 120.0)
    stored = stored_logits.encode(fitted, vocabulary)
    teacher = stored_logits.decode([stored], vocabulary)
    error = stored_logits.storage_error(fitted, teacher)
    assert stored.stored_bytes / tokens <= 120
    assert error.kl_nats < 3e-4
    assert error.total_variation < 0.01
    total = teacher.log_probabilities.exp().sum(-1) + teacher.log_tail.exp()
    torch.testing.assert_close(total, torch.ones(tokens), rtol=0, atol=1e-5)


def test_the_error_is_that_of_the_definition() -> None:
    logs = zipf_like(30, 500).double()
    top = stored_logits.choose(logs, limit=40, tail=0.01)
    teacher = stored_logits.decode([stored_logits.encode(top, 500)], 500)
    kl = variation = 0.0
    for token in range(30):
        is_kept = teacher.log_probabilities[token] > LOG_NOTHING
        p = logs[token].exp()[teacher.ids[token][is_kept]]
        q = teacher.log_probabilities[token][is_kept].double().exp()
        p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, teacher.log_tail[token].double().exp()[None]])
        kl += float((p * (p.log() - q.log())).sum()) / 30
        variation += float((p - q).abs().sum()) / 2 / 30
    error = stored_logits.storage_error(top, teacher)
    assert error.kl_nats == pytest.approx(kl, rel=1e-3)
    assert error.total_variation == pytest.approx(variation, rel=1e-3)


def test_no_more_ids_are_kept_than_the_tail_asks_for_and_never_more_than_the_limit() -> None:
    logs = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01], [0.999, 0.001, 0, 0, 0], [0.2] * 5]))
    top = stored_logits.choose(logs, limit=4, tail=0.06)
    assert top.counts.tolist() == [3, 1, 4]
    assert top.tails == pytest.approx([0.05, 0.001, 0.2], abs=1e-6)
    assert top.ids[:4].tolist() == [0, 1, 2, 0]


def test_where_room_is_short_the_surest_tokens_give_theirs_to_the_others() -> None:
    logs = torch.cat([zipf_like(5, 1000), torch.log_softmax(torch.eye(1000)[:5] * 20, -1)])
    top = stored_logits.choose(logs, limit=128, tail=0.0001)
    fitted = stored_logits.fitted(top, 1000, 40.0)
    assert stored_logits.encode(fitted, 1000).stored_bytes <= 400
    assert fitted.counts[5:].tolist() == [1] * 5
    assert fitted.counts[:5].astype(int).mean() > 30


def test_parts_are_decoded_as_one_teacher_and_no_part_as_none() -> None:
    logs = zipf_like(9, 300)
    whole = stored_logits.choose(logs, limit=20, tail=0.0)
    parts = [stored_logits.encode(part, 300) for part in stored_logits.separated(whole, [4, 0, 5])]
    one = stored_logits.decode([stored_logits.encode(whole, 300)], 300)
    cut = stored_logits.decode(parts, 300)
    assert torch.equal(one.ids, cut.ids)
    assert torch.equal(one.log_probabilities, cut.log_probabilities)
    assert len(stored_logits.nothing()) == 0


def test_router_logits_come_back_but_for_a_common_offset() -> None:
    logits = 4 * torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(0)) + 7
    stored = stored_routers.encode(logits)
    back = stored_routers.decode(stored)
    assert stored.stored_bytes == 50 * 3 * (16 + 2)
    assert float(kl_sum(back.flatten(0, 1), logits.flatten(0, 1), 1.0)) / 150 < 2e-4
    same = torch.zeros(1, 1, 16)
    assert torch.equal(stored_routers.decode(stored_routers.encode(same)), same)
