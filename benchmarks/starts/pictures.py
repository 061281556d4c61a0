"""Pictures of the results: gain against forgetting, by merge, and by selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.starts.plan import MEAN, MERGES, OTHERS, SELECTED_BY, SELECTIONS, STARTS, best, grid
from benchmarks.starts.setting import DOMAINS
from benchmarks.starts.subjects import Result, Subject
from benchmarks.starts.table import Repeated, gain_of, repeated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Done = Mapping[str, Result]

STARTED, BY_LOT, OTHER = "tab:blue", "tab:gray", "tab:orange"
MERGE_COLOURS = ("tab:blue", "tab:green", "tab:red")


def write_pictures(folder: Path, done: Done) -> None:
    """Write the pictures for which there are results."""
    if repeated(done):
        _gain_and_forgetting(done).savefig(folder / "starts_gain_forgetting.png")
    if _screened(done):
        _merges(done).savefig(folder / "starts_merges.png")
    if any(gain_of(replace(SELECTED_BY[0], selection=name), done) is not None for name in SELECTIONS):
        _selections(done).savefig(folder / "starts_selections.png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _gain_and_forgetting(done: Done) -> Any:
    """One panel per domain: every repeated subject's mean, with its spread over the seeds; numbers stand for names.

    The router alone gains so little that the others could not be told apart beside it: it is told in words.
    """
    rows = [row for row in repeated(done) if row.subject.kind != "router"]
    alone = {row.domain: row for row in repeated(done) if row.subject.kind == "router"}
    domains = [domain for domain in DOMAINS if any(row.domain == domain for row in rows)]
    figure = _figure(10.5, 5.2)
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    names = list(dict.fromkeys(row.subject for row in rows))
    for axes, domain in zip(panels, domains, strict=True):
        for row in rows:
            if row.domain == domain:
                _point(axes, row, names.index(row.subject) + 1)
        axes.set_title(domain.replace("_", " "), loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("forgotten: mean rise of prose and code (nats per token)")
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        if domain in alone:
            gain, forgotten = (alone[domain].mean_spread(name)[0] for name in ("gain", "forgetting"))
            words = f"far below: router only, gain {gain:.2f}, forgotten {forgotten:.3f}"
            axes.annotate(words, (0.02, 0.03), xycoords="axes fraction", fontsize=8.5, color=OTHER)
        _plain(axes)
    panels[0].set_ylabel("gain on the domain (nats per token)")
    figure.legend(
        handles=[_handle(number, subject) for number, subject in enumerate(names, start=1)],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    return figure


def _point(axes: Axes, row: Repeated, number: int) -> None:
    gain, gain_spread = row.mean_spread("gain")
    forgotten, spread = row.mean_spread("forgetting")
    colour = _colour(row.subject)
    axes.errorbar(forgotten, gain, xerr=spread, yerr=gain_spread, color=colour, elinewidth=0.7, alpha=0.35)
    axes.plot(forgotten, gain, "o", color=colour, ms=11, mec="white")
    axes.annotate(
        str(number), (forgotten, gain), ha="center", va="center", fontsize=7.5, color="white", fontweight="bold"
    )


def _handle(number: int, subject: Subject) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", ls="", color=_colour(subject), ms=5, label=f"{number}  {subject.label}")


def _colour(subject: Subject) -> str:
    if subject.kind != "shared":
        return OTHER
    return BY_LOT if subject.merge == "random" else STARTED


def _screened(done: Done) -> list[Subject]:
    subjects = (*MERGES, *STARTS, *OTHERS)
    return [subject for subject in subjects if all(training.key in done for training in grid(subject))]


def _merges(done: Done) -> Any:
    """Gain and forgetting of everything that was screened, at its best rate; the other rates as small marks."""
    subjects = sorted(_screened(done), key=lambda subject: done[best(subject, done).key].gain)
    figure = _figure(10.5, 1.2 + 0.27 * len(subjects))
    gains, losses = figure.subplots(1, 2, sharey=True)
    for place, subject in enumerate(subjects):
        chosen, colour = done[best(subject, done).key], _colour(subject)
        for axes, name in ((gains, "gain"), (losses, "forgetting")):
            tried = [getattr(done[training.key], name) for training in grid(subject)]
            axes.plot(tried, [place] * len(tried), "|", color=colour, alpha=0.5, ms=7)
            axes.plot(getattr(chosen, name), place, "o", color=colour, ms=5.5)
    gains.set_yticks(range(len(subjects)), [subject.label for subject in subjects], fontsize=8.5)
    gains.set_xlabel("gain on arithmetic (nats per token)")
    losses.set_xlabel("forgotten: mean rise of prose and code (nats per token)")
    gains.set_title("One seed; dot: best rate, bars: the others", loc="left", fontsize=11, fontweight="bold")
    for axes in (gains, losses):
        _plain(axes)
    return figure


def _selections(done: Done) -> Any:
    """Gain by selection, a row of dots per merge; the spread over the seeds where there are several."""
    spreads = {row.subject: row.mean_spread("gain")[1] for row in repeated(done) if row.domain == DOMAINS[0]}
    names = (MEAN.selection, *SELECTIONS)
    figure = _figure(8.5, 4.2)
    axes = figure.subplots()
    for number, merge in enumerate(SELECTED_BY):
        offset = 0.1 * (number - (len(SELECTED_BY) - 1) / 2)
        subjects = [replace(merge, selection=name) for name in names]
        found = [(place + offset, subject, gain_of(subject, done)) for place, subject in enumerate(subjects)]
        there = [(place, subject, gain) for place, subject, gain in found if gain is not None]
        axes.errorbar(
            [place for place, _, _ in there],
            [gain for _, _, gain in there],
            yerr=[spreads.get(subject, 0.0) for _, subject, _ in there],
            fmt="o",
            color=MERGE_COLOURS[number],
            elinewidth=1.2,
            label=merge.merge_label,
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("gain on arithmetic (nats per token)")
    axes.set_title(
        "Which experts are selected, by merge: one seed; bars: spread where there are three",
        loc="left",
        fontsize=10.5,
        fontweight="bold",
    )
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=len(SELECTED_BY))
    _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
