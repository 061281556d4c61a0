"""Choosing half of a pool of texts: the lazy greedy choice against looking at every candidate for every choice.

A candidate here is one computed gain: a document looked at for one choice. Times are of the processor, not of the
clock: all of it is one thread, and candidates per second are per core.
"""

from __future__ import annotations

import time
from itertools import islice

import numpy as np

from benchmarks.measurement import Measurement
from nexus_core.data.documents import Document
from nexus_core.data.sampling import STRATEGIES, choose
from nexus_core.data.sampling.coverage import CoverageGreedy
from nexus_core.data.sampling.uses import TokenUses, token_uses

DOCUMENTS, MEAN_LENGTH, VOCABULARY, SUBJECTS = 12_000, 185, 60_000, 200

# Choices after which the plain rule has told its pace: all of them would take minutes.
PLAIN_CHOICES = 60


def run() -> list[Measurement]:
    documents = zipf_documents()
    tokens = sum(map(len, documents)) // 2
    against = "coverage, lazily"

    start = time.process_time()
    uses = token_uses(documents)
    prepared = time.process_time()
    greedy, left, choices = CoverageGreedy(uses), tokens, 0
    while left > 0:
        left -= len(documents[next(greedy)])
        choices += 1
    lazy = time.process_time() - prepared
    # What the plain rule would compute: every candidate that is left, for every choice.
    plain_candidates = sum(len(documents) - number for number in range(choices))
    plain_pace = plain_candidates_per_second(uses)
    plain = plain_candidates / plain_pace

    rows = [
        Measurement(
            "sampling",
            against,
            lazy,
            1.0,
            against,
            f"{greedy.evaluations / lazy / 1e6:.1f}M candidates/s; {choices:,} of {len(documents):,} documents, "
            f"{greedy.evaluations:,} gains, {1e3 * (prepared - start):.0f} ms to count tokens",
        ),
        Measurement(
            "sampling",
            "coverage, every candidate at every choice",
            plain,
            plain / lazy,
            against,
            f"{plain_pace / 1e6:.1f}M candidates/s; {plain_candidates:,} gains, from {PLAIN_CHOICES} choices",
        ),
    ]
    for strategy in STRATEGIES:
        start = time.process_time()
        _, report = choose(documents, tokens, strategy, VOCABULARY, seed=0)
        seconds = time.process_time() - start
        chosen, random = report["chosen"], report["random"]
        note = (
            f"KL {chosen['kl_to_pool_nats'] / random['kl_to_pool_nats']:.2f} x a random draw's, vocabulary "
            f"{chosen['vocabulary_coverage']:.1%} against {random['vocabulary_coverage']:.1%}"
        )
        rows.append(Measurement("sampling", f"{strategy}, with its report", seconds, seconds / lazy, against, note))
    return rows


def zipf_documents() -> list[Document]:
    """Texts of ranks that follow Zipf's law: half of every text from all words, half from its subject's order of them.

    Lengths are as uneven as real ones, and a text repeats its own words.
    """
    generator = np.random.default_rng(0)
    cumulative_V = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    cumulative_V /= cumulative_V[-1]
    orders = [generator.permutation(VOCABULARY) for _ in range(SUBJECTS)]
    lengths = np.maximum(generator.lognormal(np.log(MEAN_LENGTH) - 0.18, 0.6, DOCUMENTS).astype(int), 8)
    documents = []
    for length in lengths.tolist():
        words = np.searchsorted(cumulative_V, generator.random(length))
        of_subject = generator.random(length) < 0.5
        words[of_subject] = orders[generator.integers(SUBJECTS)][words[of_subject]]
        # A quarter of the words stand in the text already.
        repeats = np.flatnonzero(generator.random(length) < 0.25)
        words[repeats] = words[generator.integers(0, np.maximum(repeats, 1))]
        documents.append(Document(words.astype(np.int32), np.ones(length, dtype=bool), "zipf"))
    return documents


def plain_candidates_per_second(uses: TokenUses) -> float:
    """The pace of a choice that computes every gain anew, vectorised over all documents."""
    taken = list(islice(CoverageGreedy(uses), PLAIN_CHOICES))
    counts_U = np.zeros(len(uses.frequency_U))
    root_q_X = np.sqrt(uses.frequency_U)[uses.tokens_X]
    start = time.process_time()
    for document in taken:
        before_X = counts_U[uses.tokens_X]
        gains_X = root_q_X * (np.sqrt(before_X + uses.uses_X) - np.sqrt(before_X))
        (np.add.reduceat(gains_X, uses.starts_N1[:-1]) / uses.lengths_N).argmax()
        entries = slice(uses.starts_N1[document], uses.starts_N1[document + 1])
        counts_U[uses.tokens_X[entries]] += uses.uses_X[entries]
    return PLAIN_CHOICES * len(uses.lengths_N) / (time.process_time() - start)
