"""A teacher's next-token distributions in about a hundred bytes a token.

Of each token the likeliest ids are kept until all others together are less likely than `tail`, and no more than a
limit; the mass of the others is kept too, because leaving it out is a larger error than leaving out the others' names
(0.0135 against 0.0018 in total variation, at 128 ids). Log-probabilities lie on 64 levels between the least and the
likeliest kept one; that they and the tail sum to 1 gives their common offset, which so costs nothing.

    # n tokens, C of them in one chunk, N kept ids of all tokens together, M kept ids of a token at most, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nexus_core.distill import id_sets
from nexus_core.distill.divergence import LOG_NOTHING
from nexus_core.distill.teachers import StoredTeacher

BITS = 6
LEVELS = 2**BITS - 1

# Of a token, beside its ids and their levels: how many they are, the step between levels, the tail.
OVERHEAD_BYTES = 5

# Halvings of the interval in which the common tail is looked for; 2^-24 is the last bit of a float32 probability.
BISECTIONS = 24

# The least tail that is told from none: the smallest number above 0 of float16.
SMALLEST_TAIL = 2.0**-24


@dataclass(frozen=True)
class StoredLogits:
    """n tokens as they are stored. counts (n,) uint8: kept ids; steps (n,) float16: nats between two levels; tails (n,)
    float16: mass of all other ids; data: ids of all tokens (`id_sets`), then their levels, 6 bits each.
    """

    counts: np.ndarray
    steps: np.ndarray
    tails: np.ndarray
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def stored_bytes(self) -> int:
        return self.counts.nbytes + self.steps.nbytes + self.tails.nbytes + self.data.nbytes


@dataclass(frozen=True)
class TopLogits:
    """What is to be stored of n tokens: ids and log_probabilities (N,), likeliest first within a token."""

    counts: np.ndarray
    ids: np.ndarray
    log_probabilities: np.ndarray
    tails: np.ndarray


def choose(log_probabilities_CV: torch.Tensor, *, limit: int, tail: float) -> TopLogits:
    """The likeliest ids of each token until no more than `tail` is left, at least one and at most `limit`."""
    limit = min(limit, log_probabilities_CV.shape[-1])
    top = log_probabilities_CV.topk(limit, dim=-1)
    left_CM = 1.0 - top.values.double().exp().cumsum(dim=-1)
    counts_C = 1 + (left_CM[:, :-1] > tail).sum(dim=-1)
    tails_C = left_CM.gather(-1, counts_C[:, None] - 1)[:, 0].clamp_min(0.0)
    is_kept_CM = torch.arange(limit, device=counts_C.device) < counts_C[:, None]
    return TopLogits(
        counts_C.cpu().numpy().astype(np.uint8),
        top.indices[is_kept_CM].cpu().numpy(),
        top.values[is_kept_CM].cpu().numpy().astype(np.float64),
        tails_C.cpu().numpy(),
    )


def joined(parts: Sequence[TopLogits]) -> TopLogits:
    """Several chunks' tokens as one."""
    fields = ("counts", "ids", "log_probabilities", "tails")
    return TopLogits(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def separated(top: TopLogits, tokens: Sequence[int]) -> list[TopLogits]:
    """The parts of so many tokens each that were joined."""
    token_ends = np.cumsum(tokens)[:-1]
    id_ends = np.concatenate([[0], np.cumsum(top.counts.astype(np.int64))])[np.cumsum(tokens)[:-1]]
    return [
        TopLogits(*parts)
        for parts in zip(
            np.split(top.counts, token_ends),
            np.split(top.ids, id_ends),
            np.split(top.log_probabilities, id_ends),
            np.split(top.tails, token_ends),
            strict=True,
        )
    ]


def fitted(top: TopLogits, vocabulary_size: int, bytes_per_token: float) -> TopLogits:
    """As many of the ids as fit into so many bytes a token on average: those of every token down to one common tail.

    So a token whose teacher is sure leaves its bytes to those that need them. All ids, if they fit.
    """
    counts_n = top.counts.astype(np.int64)
    starts_n = np.cumsum(counts_n) - counts_n
    mass_N = np.exp(top.log_probabilities)
    before_N = np.cumsum(mass_N) - mass_N
    # What is left after each id, the token's own earlier ones included.
    left_N = np.maximum(1.0 - (before_N + mass_N - np.repeat(before_N[starts_n], counts_n)), 0.0)

    def counts_at(tail: float) -> np.ndarray:
        is_needed_N = left_N > tail
        return np.minimum(1 + np.add.reduceat(is_needed_N.astype(np.int64), starts_n), counts_n)

    def fits(counts: np.ndarray) -> bool:
        return coded_bytes(counts, vocabulary_size) + OVERHEAD_BYTES * len(counts) <= bytes_per_token * len(counts)

    if len(counts_n) == 0 or fits(counts_n):
        return top
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(counts_at(middle)) else (middle, high)
    kept_n = counts_at(high)
    is_kept_N = np.arange(len(mass_N)) - np.repeat(starts_n, counts_n) < np.repeat(kept_n, counts_n)
    return TopLogits(
        kept_n.astype(np.uint8),
        top.ids[is_kept_N],
        top.log_probabilities[is_kept_N],
        left_N[starts_n + kept_n - 1],
    )


def encode(top: TopLogits, vocabulary_size: int) -> StoredLogits:
    """The tokens in their stored form."""
    if not len(top.counts):
        return StoredLogits(top.counts, np.zeros(0, np.float16), np.zeros(0, np.float16), np.zeros(0, np.uint8))
    counts_n = top.counts.astype(np.int64)
    tokens_N = np.repeat(np.arange(len(counts_n)), counts_n)
    ends_n = np.cumsum(counts_n)
    highest_n, lowest_n = top.log_probabilities[ends_n - counts_n], top.log_probabilities[ends_n - 1]
    # Rounded up, so that the likeliest id is never beyond the last level.
    steps_n = np.nextafter(((highest_n - lowest_n) / LEVELS).astype(np.float16), np.float16(np.inf))
    levels_N = np.rint((top.log_probabilities - lowest_n[tokens_N]) / steps_n.astype(np.float64)[tokens_N])
    order_N = np.lexsort((top.ids, tokens_N))
    ids = id_sets.encode(top.ids[order_N], counts_n, vocabulary_size)
    bits_N6 = (levels_N[order_N].astype(np.uint8)[:, None] >> np.arange(BITS, dtype=np.uint8)) & 1
    data = np.frombuffer(ids + np.packbits(bits_N6).tobytes(), dtype=np.uint8)
    return StoredLogits(top.counts, steps_n, top.tails.astype(np.float16), data)


def coded_bytes(counts_n: np.ndarray, vocabulary_size: int) -> int:
    """How many bytes of `data` tokens with so many kept ids have."""
    return id_sets.coded_bytes(counts_n, vocabulary_size) - (-BITS * int(counts_n.sum()) // 8)


def decode(parts: Sequence[StoredLogits], vocabulary_size: int, device: str | torch.device = "cpu") -> StoredTeacher:
    """A teacher of the tokens of all parts, one after the other."""
    counts_n = np.concatenate([part.counts for part in parts]).astype(np.int64)
    ids_N = np.concatenate(
        [id_sets.decode(part.data[: id_sets.coded_bytes(part.counts, vocabulary_size)], part.counts, vocabulary_size)
         for part in parts]
    )  # fmt: skip
    levels_N = np.concatenate([_levels(part, vocabulary_size) for part in parts])
    steps_n = np.concatenate([part.steps for part in parts]).astype(np.float32)
    tails_n = np.concatenate([part.tails for part in parts]).astype(np.float64).clip(SMALLEST_TAIL, 1.0)
    width = int(counts_n.max(initial=1))
    is_kept_nM = np.arange(width) < counts_n[:, None]
    ids_nM = np.repeat(ids_N[np.cumsum(counts_n) - counts_n, None], width, axis=1)
    ids_nM[is_kept_nM] = ids_N
    logs_nM = np.full((len(counts_n), width), -np.inf)
    logs_nM[is_kept_nM] = levels_N * np.repeat(steps_n, counts_n)
    highest_n1 = logs_nM.max(axis=1, keepdims=True)
    sums_n1 = np.exp(logs_nM - highest_n1).sum(axis=1, keepdims=True)
    logs_nM += np.log1p(-tails_n.clip(max=1 - SMALLEST_TAIL))[:, None] - highest_n1 - np.log(sums_n1)
    logs_nM[~is_kept_nM] = LOG_NOTHING
    return StoredTeacher(
        torch.from_numpy(ids_nM).to(device),
        torch.from_numpy(logs_nM.astype(np.float32)).to(device),
        torch.from_numpy(np.log(tails_n).astype(np.float32)).to(device),
    )


def nothing(device: str | torch.device = "cpu") -> StoredTeacher:
    """The teacher of no token."""
    empty = torch.zeros(0, 1, device=device)
    return StoredTeacher(empty.long(), empty, empty[:, 0])


@dataclass(frozen=True)
class StorageError:
    """What storing lost, mean over tokens. kl_nats: between the teacher and what is read back, both as distributions
    over the kept ids and "any other"; total_variation: half the sum of the absolute differences between them; tail:
    mass of the ids that are not kept.
    """

    kl_nats: float
    total_variation: float
    tail: float
    ids: float


def storage_error(top: TopLogits, teacher: StoredTeacher) -> StorageError:
    """Of what was stored (`top`) against what is read back."""
    is_kept_nM = (teacher.log_probabilities > LOG_NOTHING).cpu().numpy()
    # Within a token, read back in the order of ids, stored in that of likelihood.
    order_N = np.lexsort((top.ids, np.repeat(np.arange(len(top.counts)), top.counts.astype(np.int64))))
    true_N, found_N = top.log_probabilities[order_N], teacher.log_probabilities.double().cpu().numpy()[is_kept_nM]
    true_tails = top.tails.clip(SMALLEST_TAIL)
    found_tails = teacher.log_tail.double().cpu().numpy()
    tokens = max(len(top.counts), 1)
    kl = (np.exp(true_N) * (true_N - found_N)).sum() + (true_tails * (np.log(true_tails) - found_tails)).sum()
    variation = np.abs(np.exp(true_N) - np.exp(found_N)).sum() + np.abs(true_tails - np.exp(found_tails)).sum()
    return StorageError(
        float(kl) / tokens, float(variation) / 2 / tokens, float(top.tails.sum()) / tokens, len(true_N) / tokens
    )


def _levels(part: StoredLogits, vocabulary_size: int) -> np.ndarray:
    kept = int(part.counts.astype(np.int64).sum())
    packed = part.data[id_sets.coded_bytes(part.counts, vocabulary_size) :]
    bits_N6 = np.unpackbits(packed, count=kept * BITS).reshape(kept, BITS)
    return (bits_N6 << np.arange(BITS, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
