"""A picture of a training schedule before it runs: learning rate, temperature, and when the router stops learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#777777"


def schedule_picture(
    learning_rates: Sequence[float], temperatures: Sequence[float], router_freezes_after: int | None = None
) -> Figure:
    """Learning rate and temperature of steps 1, 2, ...; router_freezes_after: a step to mark, None for none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(learning_rates) + 1)
    axes.plot(steps, learning_rates, color=BLUE, linewidth=1.8)
    axes.set_title("Schedule", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate", color=BLUE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.spines[["top"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if router_freezes_after is not None:
        axes.axvline(router_freezes_after, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            "router stops learning",
            (router_freezes_after, axes.get_ylim()[1] * 0.04),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )
    right = axes.twinx()
    right.plot(steps, temperatures, color=ORANGE, linewidth=1.8)
    right.set_ylabel("distillation temperature", color=ORANGE)
    right.set_ylim(bottom=0)
    right.spines[["top"]].set_visible(False)
    return figure
