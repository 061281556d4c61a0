"""Which candidates are chosen: the lazy greedy against a slow one, and what it is worth."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from nexus_core.data.documents import Document
from nexus_core.data.sampling import STRATEGIES, choose, coverage, kl_greedy, kl_to_pool, token_counts
from nexus_core.data.sampling.coverage import CoverageGreedy
from nexus_core.data.sampling.uses import token_uses
from nexus_core.errors import DataError

VOCABULARY = 60


def pool(count: int, seed: int, longest: int = 40) -> list[Document]:
    """Documents on different subjects: each draws from its own skewed part of the vocabulary."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        weights = generator.dirichlet(np.full(VOCABULARY, 0.1))
        tokens = generator.choice(VOCABULARY, size=generator.integers(2, longest), p=weights).astype(np.int32)
        documents.append(Document(tokens, np.ones(len(tokens), bool), "pool"))
    return documents


def slow_greedy(documents: list[Document], tokens: int) -> list[int]:
    """Of all that are left take the one with the largest gain of sum_t sqrt(q_t n_t) per token; the first of equals."""
    pool_counts = token_counts(documents, VOCABULARY)
    q = pool_counts / pool_counts.sum()
    counts = np.zeros(VOCABULARY)
    chosen: list[int] = []
    while tokens > 0 and len(chosen) < len(documents):
        gains = {}
        for index, document in enumerate(documents):
            if index not in chosen:
                after = counts + np.bincount(document.tokens, minlength=VOCABULARY)
                gain = sum(math.sqrt(q[t]) * (math.sqrt(after[t]) - math.sqrt(counts[t])) for t in range(VOCABULARY))
                gains[index] = gain / len(document)
        best = max(gains, key=lambda index: (round(gains[index], 12), -index))
        chosen.append(best)
        counts += np.bincount(documents[best].tokens, minlength=VOCABULARY)
        tokens -= len(documents[best])
    return chosen


def slow_kl_greedy(documents: list[Document], tokens: int) -> list[int]:
    """Of all that are left take the one with the largest KL(chosen with it || pool) + 0.01 x length."""
    pool_counts = token_counts(documents, VOCABULARY)
    chosen: list[int] = []
    while tokens > 0 and len(chosen) < len(documents):
        scores = {
            index: kl_to_pool(token_counts([documents[other] for other in [*chosen, index]], VOCABULARY), pool_counts)
            + 0.01 * len(documents[index])
            for index in range(len(documents))
            if index not in chosen
        }
        best = max(scores, key=lambda index: (round(scores[index], 12), -index))
        chosen.append(best)
        tokens -= len(documents[best])
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_the_slow_greedy(seed):
    documents = pool(40, seed)
    for tokens in (1, 100, 400, 10_000):
        assert list(coverage(documents, tokens, VOCABULARY, np.random.default_rng(0))) == slow_greedy(documents, tokens)


def test_coverage_is_nearer_to_the_pool_than_chance_and_uses_more_of_the_vocabulary():
    documents = pool(400, seed=9)
    chosen, report = choose(documents, 800, "coverage", VOCABULARY, seed=0)
    assert report["chosen"]["kl_to_pool_nats"] < 0.5 * report["random"]["kl_to_pool_nats"]
    assert report["chosen"]["vocabulary_coverage"] >= report["random"]["vocabulary_coverage"]
    assert 800 <= report["chosen"]["tokens"] == sum(map(len, chosen)) < 840
    assert report["candidates"] == 400


def test_coverage_is_the_slow_greedy_over_several_blocks_of_documents():
    # Enough for the order to be made anew and for many blocks, with some documents twice.
    documents = pool(300, seed=7, longest=12)
    documents += documents[:40]
    tokens = sum(map(len, documents)) // 3
    assert list(coverage(documents, tokens, VOCABULARY, np.random.default_rng(0))) == slow_greedy(documents, tokens)


def test_lazy_greedy_computes_far_fewer_gains_than_a_plain_one_would():
    documents = pool(2000, seed=8)
    greedy = CoverageGreedy(token_uses(documents))
    chosen = list(islice(greedy, 800))
    plain = sum(2000 - number for number in range(len(chosen)))
    assert len(set(chosen)) == 800
    assert greedy.evaluations < plain / 2


@pytest.mark.parametrize("seed", range(3))
def test_kl_greedy_is_the_first_published_rule(seed):
    documents = pool(40, seed)
    for tokens in (1, 300, 10_000):
        chosen = list(kl_greedy(documents, tokens, VOCABULARY, np.random.default_rng(0)))
        assert chosen == slow_kl_greedy(documents, tokens)


def test_kl_greedy_takes_the_longest_first_and_ends_further_from_the_pool_than_chance():
    documents = pool(300, seed=5, longest=900)
    chosen, report = choose(documents, 20_000, "kl_greedy", VOCABULARY, seed=0)
    longest = sorted(documents, key=len, reverse=True)[: len(chosen)]
    assert len({id(document) for document in chosen} & {id(document) for document in longest}) > 0.9 * len(chosen)
    assert report["chosen"]["kl_to_pool_nats"] > report["random"]["kl_to_pool_nats"]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_empty_documents_and_an_empty_pool_are_no_trouble(strategy):
    nothing = Document(np.empty(0, np.int32), np.empty(0, bool), "nothing")
    chosen, _ = choose([nothing, *pool(5, seed=0), nothing], 10**6, strategy, VOCABULARY, seed=0)
    assert sum(map(len, chosen)) == sum(map(len, pool(5, seed=0)))
    assert choose([], 10, strategy, VOCABULARY, seed=0)[0] == []


def test_report_counts_the_tokens_of_each_source():
    one = [replace(document, source="one") for document in pool(60, seed=1)]
    other = [replace(document, source="other") for document in pool(30, seed=2)]
    chosen, report = choose([*one, *other], 600, "coverage", VOCABULARY, seed=0)
    assert report["candidate_tokens_by_source"] == {"one": sum(map(len, one)), "other": sum(map(len, other))}
    by_source = {
        name: sum(len(document) for document in chosen if document.source == name) for name in ("one", "other")
    }
    assert report["chosen"]["tokens_by_source"] == by_source
    assert sum(report["random"]["tokens_by_source"].values()) == report["random"]["tokens"]


def test_coverage_does_not_take_the_longest_first():
    documents = pool(200, seed=2)
    chosen, _ = choose(documents, 600, "coverage", VOCABULARY, seed=0)
    assert np.mean([len(document) for document in chosen]) < 1.3 * np.mean([len(document) for document in documents])


def test_equal_documents_are_taken_in_order():
    same = [Document(np.array([1, 2], np.int32), np.ones(2, bool), str(number)) for number in range(5)]
    chosen, _ = choose(same, 6, "coverage", VOCABULARY, seed=0)
    assert [document.source for document in chosen] == ["0", "1", "2"]


def test_uniform_depends_on_the_seed_alone_and_repeats_nothing():
    documents = pool(100, seed=3)
    first, _ = choose(documents, 500, "uniform", VOCABULARY, seed=1)
    again, report = choose(documents, 500, "uniform", VOCABULARY, seed=1)
    other, _ = choose(documents, 500, "uniform", VOCABULARY, seed=2)
    assert [id(document) for document in first] == [id(document) for document in again]
    assert [id(document) for document in first] != [id(document) for document in other]
    assert len({id(document) for document in first}) == len(first)
    # the random draw it is compared with is another one
    assert report["chosen"] != report["random"]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_everything_is_taken_if_there_is_too_little(strategy):
    documents = pool(20, seed=4)
    chosen, report = choose(documents, 10**9, strategy, VOCABULARY, seed=0)
    assert len(chosen) == 20
    assert report["chosen"]["kl_to_pool_nats"] == pytest.approx(0, abs=1e-12)
    assert report["chosen"]["vocabulary_coverage"] == 1


def test_kl_is_the_formula():
    chosen, whole = np.array([3, 1, 0]), np.array([4, 4, 2])
    assert kl_to_pool(chosen, whole) == pytest.approx(0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.4))


def test_unknown_strategy():
    with pytest.raises(DataError, match="'coverge' is not known; did you mean 'coverage'"):
        choose(pool(3, 0), 10, "coverge", VOCABULARY, 0)
