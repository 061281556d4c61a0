"""A picture of a training schedule before it runs: learning rate, temperature, and when the router stops learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Eighths of a line of text, from nothing to all of it.
BLOCKS = " ▁▂▃▄▅▆▇█"
COLUMNS = 60

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#777777"


def schedule_picture(
    learning_rates: Sequence[float],
    temperatures: Sequence[float],
    marked_step: int | None,
    mark: str,
) -> Figure:
    """Learning rate and temperature of steps 1, 2, ...; marked_step: after which `mark` is true, None for none."""
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
    if marked_step is not None:
        axes.axvline(marked_step, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            mark,
            (marked_step, axes.get_ylim()[1] * 0.04),
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


def schedule_lines(learning_rates: Sequence[float], temperatures: Sequence[float]) -> list[str]:
    """The same as text for a terminal: one line of blocks each, from zero, and the values that it goes through."""
    lines = []
    for name, values, form in (("rate", learning_rates, ".3g"), ("temperature", temperatures, ".3g")):
        highest = max(values)
        columns = [values[column * len(values) // COLUMNS] for column in range(COLUMNS)]
        columns[-1] = values[-1]
        blocks = "".join(BLOCKS[round(value / highest * (len(BLOCKS) - 1))] for value in columns)
        lines.append(f"{name:<12} {blocks}  {values[0]:{form}} .. {highest:{form}} .. {values[-1]:{form}}")
    return lines
