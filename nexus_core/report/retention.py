"""A picture of gain and retention: each data set's change of perplexity, and the rise that is allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN, RED, BLUE, GREY = "#3a9a5b", "#b8433f", "#2f6fb0", "#777777"


def retention_picture(
    perplexities: Mapping[str, tuple[float, float]], learnt: Collection[str], max_perplexity_increase: float
) -> Figure:
    """One bar per set: the student's perplexity against the base's, in percent; lower is better.

    perplexities: base's and student's by set. learnt: sets that were to be learnt; the others were to be kept, and a
    dotted line shows the rise allowed for them.
    """
    from matplotlib.figure import Figure

    names = sorted(perplexities, key=lambda name: (name not in learnt, name))
    changes = [100 * (perplexities[name][1] / perplexities[name][0] - 1) for name in names]
    allowed = 100 * max_perplexity_increase
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.barh(
        range(len(names)),
        changes,
        height=0.55,
        color=[_colour(name in learnt, change, allowed) for name, change in zip(names, changes, strict=True)],
    )
    axes.set_yticks(range(len(names)), [f"{name}\n{'learnt' if name in learnt else 'kept'}" for name in names])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    widest = max(*(abs(change) for change in changes), allowed, 1.0)
    for row, (name, change) in enumerate(zip(names, changes, strict=True)):
        base, student = perplexities[name]
        axes.annotate(
            f"{change:+.1f}%   {base:.4g} → {student:.4g}",
            (max(change, 0), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none"},
        )
    if any(name not in learnt for name in names):
        axes.axvline(allowed, color=GREY, linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            f"allowed {allowed:+.3g}%",
            (allowed, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )
    axes.set_xlim(min(*changes, 0.0) - 0.08 * widest, max(*changes, allowed, 0.0) + 0.75 * widest)
    axes.set_xlabel("change of perplexity on held-out text, % (lower is better)")
    axes.set_title("Gain and retention", loc="left", fontsize=11, fontweight="bold", pad=14)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _colour(is_learnt: bool, change: float, allowed: float) -> str:
    if is_learnt:
        return GREEN if change < 0 else RED
    return BLUE if change <= allowed else RED
