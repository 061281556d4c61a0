"""Results as tables: Markdown to read, JSON to go on with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.starts.plan import (
    LEADS,
    LONGER,
    MEAN,
    MERGES,
    OTHERS,
    OTHERWISE_SELECTED,
    SEEDS,
    SELECTED_BY,
    STARTS,
    as_screened,
    best,
    grid,
    selected_like,
)
from benchmarks.starts.setting import DOMAINS
from benchmarks.starts.subjects import GRIDS, Result, Subject, Training

Done = Mapping[str, Result]

MARKDOWN_NAME, JSON_NAME = "starts.md", "starts.json"


@dataclass(frozen=True)
class Repeated:
    """A subject's results on one domain over several seeds, in the seeds' order, and its lead over the mean.

    lead: mean over seeds of its gain less that of MEAN with the same seed; None without it.
    """

    subject: Subject
    domain: str
    results: tuple[Result, ...]
    lead: float | None
    lead_spread: float | None

    def mean_spread(self, name: str) -> tuple[float, float]:
        """Mean and sample standard deviation over the seeds of a number of the results."""
        values = [getattr(result, name) for result in self.results]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def repeated(done: Done) -> list[Repeated]:
    """Every subject that was trained with every seed, at its best rate, by domain, the largest gain first."""
    return _over_seeds(done, lambda subject: best_rate(subject, done))


def at_the_lowest_rate(done: Done) -> list[Repeated]:
    """Of those that were tried so, the same at the lowest rate of the grid."""
    return [row for row in _over_seeds(done, lambda subject: GRIDS[subject.kind][0]) if row.subject in LEADS]


def _over_seeds(done: Done, rate_of: Callable[[Subject], float | None]) -> list[Repeated]:
    by_subject: dict[tuple[str, Subject], dict[int, Result]] = {}
    for result in done.values():
        training = result.training
        if training.length == 1 and training.learning_rate == rate_of(training.subject):
            by_subject.setdefault((training.domain, training.subject), {})[training.seed] = result
    several = {place: found for place, found in by_subject.items() if len(found) == len(SEEDS)}
    rows = []
    for (domain, subject), found in several.items():
        against = several.get((domain, MEAN), {})
        leads = [found[seed].gain - against[seed].gain for seed in SEEDS if seed in against]
        rows.append(
            Repeated(
                subject,
                domain,
                tuple(found[seed] for seed in SEEDS),
                statistics.fmean(leads) if leads else None,
                statistics.stdev(leads) if leads else None,
            )
        )
    return sorted(rows, key=lambda row: (DOMAINS.index(row.domain), -row.mean_spread("gain")[0]))


def write_tables(folder: Path, done: Done) -> None:
    """Write `starts.md` and `starts.json` of whatever has been trained so far."""
    (folder / MARKDOWN_NAME).write_text("\n\n".join(markdown(done)) + "\n")
    rows = [
        {
            "subject": row.subject.label,
            "domain": row.domain,
            "seeds": [result.training.seed for result in row.results],
            "learning_rate": row.results[0].training.learning_rate,
            "parameters": row.results[0].parameters,
            "gain_nats": [result.gain for result in row.results],
            "forgetting_nats": [result.forgetting for result in row.results],
            "lead_over_reference_nats": row.lead,
            "lead_spread_nats": row.lead_spread,
        }
        for row in repeated(done)
    ]
    content = {"trainings": [result.as_record() for result in done.values()], "repeated": rows}
    (folder / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n")


def markdown(done: Done) -> list[str]:
    """Tables of what was repeated, by domain; of the screen of merges and starts; of the selections."""
    parts = []
    for title, rows in (
        (f"Repeated with {len(SEEDS)} seeds", repeated(done)),
        ("The same at the lowest rate", at_the_lowest_rate(done)),
    ):
        if rows:
            parts.append(f"### {title}\n\n{_repeated_table(rows)}")
    screened = [
        subject for subject in (*MERGES, *STARTS, *OTHERS) if all(training.key in done for training in grid(subject))
    ]
    if screened:
        results = sorted((done[best(subject, done).key] for subject in screened), key=lambda result: -result.score)
        parts.append("### Screen: one seed, best rate\n\n" + _table(_SCREEN_HEAD, [_screen_row(r) for r in results]))
    longer = [done[training.key] for training in LONGER if training.key in done]
    if longer:
        title = f"### {longer[0].training.length} times as long: one seed\n\n"
        parts.append(title + _table(_SCREEN_HEAD, [_screen_row(result) for result in longer]))
    lines = selection_rows(done)
    if lines:
        head = ("selection", *(merge.merge_label for merge in SELECTED_BY))
        parts.append("### Selections: gain, one seed\n\n" + _table(head, lines))
    return parts


def selection_rows(done: Done) -> list[list[str]]:
    """Gains by selection and merge; a dash where a training is missing."""
    ways = dict.fromkeys(selected_like(MEAN, subject) for subject in (MEAN, *OTHERWISE_SELECTED))
    lines = []
    for way in ways:
        gains = [gain_of(selected_like(merge, way), done) for merge in SELECTED_BY]
        if any(gain is not None for gain in gains):
            lines.append([way.selection_label, *("-" if gain is None else f"{gain:.3f}" for gain in gains)])
    return lines


def best_rate(subject: Subject, done: Done) -> float | None:
    """The rate of the highest score that the subject's merge had when it was screened; None if it was not yet."""
    screened = as_screened(subject)
    if any(training.key not in done for training in grid(screened)):
        return None
    return best(screened, done).learning_rate


def gain_of(subject: Subject, done: Done) -> float | None:
    """The first seed's gain at the best rate of the subject's merge; None if it was not trained."""
    rate = best_rate(subject, done)
    key = "" if rate is None else Training(subject, rate).key
    return done[key].gain if key in done else None


_SCREEN_HEAD = ("trained", "rate", "gain", "forgot prose", "forgot code")


def _repeated_table(rows: Sequence[Repeated]) -> str:
    """A line per subject in the order of the first domain; per domain gain, lead over the mean, and forgetting."""
    domains = [domain for domain in DOMAINS if any(row.domain == domain for row in rows)]
    head = ["trained", "parameters", "rate"]
    for domain in domains:
        head += [f"{domain.replace('_', ' ')}: gain", "more than the mean", "forgotten"]
    by_subject: dict[Subject, dict[str, Repeated]] = {}
    for row in rows:
        by_subject.setdefault(row.subject, {})[row.domain] = row
    lines = []
    for subject, found in by_subject.items():
        first = next(iter(found.values())).results[0]
        line = [subject.label, f"{first.parameters / 1000:,.0f}k", f"{first.training.learning_rate:g}"]
        for domain in domains:
            line += _repeated_cells(found[domain]) if domain in found else ["-"] * 3
        lines.append(line)
    return _table(head, lines)


def _repeated_cells(row: Repeated) -> list[str]:
    gain, forgotten = row.mean_spread("gain"), row.mean_spread("forgetting")
    lead = "-" if row.lead is None or row.subject == MEAN else f"{row.lead:+.3f} ± {row.lead_spread or 0:.3f}"
    return [f"{gain[0]:.3f} ± {gain[1]:.3f}", lead, f"{forgotten[0]:.3f} ± {forgotten[1]:.3f}"]


def _screen_row(result: Result) -> list[str]:
    others = [name for name in result.base if name != result.training.domain]
    return [
        result.training.subject.label,
        f"{result.training.learning_rate:g}",
        f"{result.gain:.3f}",
        *(f"{result.forgotten(name):+.3f}" for name in others),
    ]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))
