"""A picture of a training run: loss and its parts, schedule, routing and gradient norm over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]

# Losses other than these are drawn too, under their own names.
PART_TITLES = {"lm": "language model (learnt)", "router_kl": "router KL", "logits_kl": "vocabulary KL (kept)"}
NOT_LOSSES = {
    "step",
    "loss",
    "learning_rate",
    "temperature",
    "gradient_norm",
    "router_l1",
    "router_entropy",
    "router_entropy_base",
    "tokens_per_second",
    "seconds",
}
BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb0", "#d9822b", "#3a9a5b", "#b8433f", "#777777"


def training_curves(rows: Rows, title: str = "Training") -> Figure:
    """Six panels over the steps of metrics.jsonl; one whose values were not computed stays empty.

    rows: as in the file; values that a run did not compute may be missing. Thin lines are single steps, thick ones
    the mean over a twentieth of the run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), dpi=110, layout="constrained")
    figure.suptitle(title)
    ((learning, distances, gradient), (entropy, router, schedule)) = figure.subplots(2, 3, sharex=True)

    _title(learning, "Learning", "nats per token")
    _curve(learning, rows, "lm", BLUE, PART_TITLES["lm"])
    _curve(learning, rows, "loss", GREY, "weighted sum of all losses")

    _title(distances, "Distance to the base", "nats per token")
    colours = iter((ORANGE, GREEN, RED, BLUE))
    for name in sorted({key for row in rows for key in row} - NOT_LOSSES - {"lm"}):
        _curve(distances, rows, name, next(colours, GREY), PART_TITLES.get(name, name))

    _title(gradient, "Gradient norm before clipping", "L2 norm")
    _curve(gradient, rows, "gradient_norm", BLUE)

    _title(entropy, "Router entropy", "nats per token")
    _curve(entropy, rows, "router_entropy", BLUE, "student")
    _curve(entropy, rows, "router_entropy_base", GREY, "base", dashed=True)

    _title(router, "Router L1 distance to the base", "sum over experts of |difference|")
    _curve(router, rows, "router_l1", BLUE)

    _title(schedule, "Schedule", "learning rate")
    schedule.yaxis.label.set_color(BLUE)
    _curve(schedule, rows, "learning_rate", BLUE, smooth=False)
    schedule.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    temperature = schedule.twinx()
    temperature.set_ylabel("temperature", color=ORANGE)
    temperature.spines["top"].set_visible(False)
    _curve(temperature, rows, "temperature", ORANGE, smooth=False)

    for axes in (gradient, router, schedule, temperature):
        axes.set_ylim(bottom=0)
    for axes in (entropy, router, schedule):
        axes.set_xlabel("step")
    return figure


def _title(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _curve(
    axes: Axes, rows: Rows, name: str, colour: str, label: str = "", *, smooth: bool = True, dashed: bool = False
) -> None:
    steps = [row["step"] for row in rows if name in row]
    values = [row[name] for row in rows if name in row]
    if not values:
        return
    style = "--" if dashed else "-"
    window = max(1, len(values) // 20)
    if smooth and window > 1:
        axes.plot(steps, values, style, color=colour, linewidth=0.6, alpha=0.3)
        values = moving_mean(values, window)
    axes.plot(steps, values, style, color=colour, linewidth=1.8, label=label)
    if label:
        axes.legend(frameon=False, fontsize=8, loc="best")


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
