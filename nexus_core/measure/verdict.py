"""What was gained and what was forgotten, as one answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nexus_core.measure.perplexity import Perplexity


@dataclass(frozen=True)
class Change:
    """One data set under the base and under the student; relative: of the perplexity, -0.1 is a tenth lower."""

    base: Perplexity
    student: Perplexity

    @property
    def relative(self) -> float:
        return self.student.perplexity / self.base.perplexity - 1


@dataclass(frozen=True)
class Verdict:
    """The answer, in two booleans and a sentence.

    retained: no kept set's perplexity rose by more than allowed; None if there is no kept set. gained: every learnt
    set's perplexity fell; None if there is no learnt set. short: a few words for tables.
    """

    retained: bool | None
    gained: bool | None
    short: str
    text: str
    max_perplexity_increase: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(changes: Mapping[str, Change], learnt: Collection[str], max_perplexity_increase: float) -> Verdict:
    """The verdict over all sets: those in `learnt` should have gained, all others must be retained.

    max_perplexity_increase: relative, 0.05 allows 5%.
    """
    gains = {name: change.relative for name, change in changes.items() if name in learnt}
    losses = {name: change.relative for name, change in changes.items() if name not in learnt}
    gained = all(relative < 0 for relative in gains.values()) if gains else None
    retained = all(relative <= max_perplexity_increase for relative in losses.values()) if losses else None
    parts = [f"{_sentence(name, changes[name])}" for name in (*gains, *losses)]
    allowed = f" (at most {max_perplexity_increase:+.1%} allowed)" if losses else ""
    short = _short(gained, retained)
    return Verdict(retained, gained, short, f"{short}: {'; '.join(parts)}{allowed}", max_perplexity_increase)


def _short(gained: bool | None, retained: bool | None) -> str:
    words = {
        (True, True): "gained and retained",
        (True, False): "gained but forgot",
        (False, True): "retained but gained nothing",
        (False, False): "forgot and gained nothing",
        (True, None): "gained",
        (False, None): "gained nothing",
        (None, True): "retained",
        (None, False): "forgot",
        (None, None): "nothing measured",
    }
    return words[(gained, retained)]


def _sentence(name: str, change: Change) -> str:
    return (
        f"perplexity of {name} {change.base.perplexity:.4g} -> {change.student.perplexity:.4g} ({change.relative:+.1%})"
    )
