"""What is routed or read of a mix of data sets when a number of tokens is wanted: drawn, packed, accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.documents import Part, documents
from nexus_core.data.packing import PackedSequences, pack
from nexus_core.data.sampling import choose
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.errors import DataError, suggestion
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Collect, Source


@dataclass(frozen=True)
class Sample:
    """The sequences drawn from one data set, and how: wanted and drawn tokens, the choice, what became of records."""

    name: str
    sequences: PackedSequences
    report: dict[str, Any]

    @property
    def shortfall(self) -> str:
        """A sentence if there was less than wanted, else empty."""
        wanted = self.report["wanted_tokens"]
        if self.sequences.tokens >= wanted:
            return ""
        return (
            f"data set '{self.name}' holds {self.sequences.tokens:,} tokens where {wanted:,} were wanted; all of them "
            "are used"
        )


def choose_shares(shares: Mapping[str, float] | None, sets: Mapping[str, Sequence[Source]]) -> dict[str, float]:
    """Each set's share of the tokens, adding up to 1; equal ones if none are given.

    Raises DataError if a share names a set that is not there.
    """
    weights = dict(shares) if shares is not None else dict.fromkeys(sets, 1.0)
    for name in weights:
        if name not in sets:
            raise DataError(f"collect.data names the data set '{name}', which is not there{suggestion(name, sets)}")
    if not weights:
        raise DataError("there is no data set to collect over; give at least one")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def draw(
    checkpoint: Checkpoint,
    sets: Mapping[str, Sequence[Source]],
    shares: Mapping[str, float],
    settings: Collect,
    part: Part,
) -> list[Sample]:
    """The sequences to route, per data set: candidates read, some of them chosen, cut to the wanted tokens."""
    tokenizer = load_tokenizer(checkpoint.folder)
    end_token = end_token_id(tokenizer)
    samples = []
    for name, wanted in _budgets(settings.tokens, shares).items():
        pool = documents(
            sets[name],
            part,
            tokenizer,
            limit_tokens=wanted,
            candidates=settings.sampling.candidates,
            seed=settings.seed,
        )
        vocabulary = max(checkpoint.description.vocabulary_size, len(tokenizer))
        with Progress("sample", min(wanted, pool.tokens), "tokens") as progress:
            chosen, choice = choose(
                pool, wanted, settings.sampling.strategy, vocabulary, settings.seed, progress.advance
            )
        sequences = pack(chosen, settings.sequence_length, end_token=end_token, limit_tokens=wanted)
        entry = {
            "wanted_tokens": wanted,
            "tokens": sequences.tokens,
            "sequences": len(sequences),
            "sampling": choice,
            "sources": pool.report_as_dict(),
        }
        samples.append(Sample(name, sequences, entry))
    return samples


def _budgets(tokens: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Tokens per set, adding up exactly: what rounding leaves goes to the largest remainders."""
    exact = {name: tokens * share for name, share in shares.items()}
    budgets = {name: int(amount) for name, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda name: budgets[name] - exact[name])
    for name in by_remainder[: tokens - sum(budgets.values())]:
        budgets[name] += 1
    return {name: max(budget, 1) for name, budget in budgets.items()}
