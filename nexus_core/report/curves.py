"""A picture of a training run: loss and its parts, schedule, routing and gradient norm over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]

# Losses other than these are drawn too, under their own names.
PART_TITLES = {
    "lm": "language model (learnt)",
    "router_kl": "router KL",
    "logits_kl": "vocabulary KL (kept)",
    "hidden_match": "hidden states (kept)",
}
HELD_OUT, HELD_OUT_BASE = "held_out/", "held_out_base/"
BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb0", "#d9822b", "#3a9a5b", "#b8433f", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, RED)


def training_curves(rows: Rows, title: str, losses: Sequence[str]) -> Figure:
    """Six panels over the steps of metrics.jsonl, eight with held-out text; one without values stays empty.

    rows: as in the file; values that a run did not compute may be missing. losses: names of the run's losses. Thin
    lines are single steps, thick ones the mean over a twentieth of the run.
    """
    from matplotlib.figure import Figure

    names = dict.fromkeys(key.removeprefix(HELD_OUT) for row in rows for key in row if key.startswith(HELD_OUT))
    figure = Figure(figsize=(18 if names else 14, 7), dpi=110, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 4 if names else 3, sharex=True)
    ((learning, distances, gradient), (entropy, router, schedule)) = (row[:3] for row in panels)
    if names:
        _held_out(panels[0][3], panels[1][3], rows, list(names))

    _title(learning, "Learning", "nats per token")
    _curve(learning, rows, "lm", BLUE, PART_TITLES["lm"])
    _curve(learning, rows, "loss", GREY, "weighted sum of all losses")

    _title(distances, "Distance to the base", "nats per token")
    colours = iter((ORANGE, GREEN, RED, BLUE))
    for name in (name for name in losses if name != "lm"):
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


def _held_out(text: Axes, change: Axes, rows: Rows, names: Sequence[str]) -> None:
    """Held-out text by data set, and what became of it against the base; the base is dashed."""
    _title(text, "Held-out text", "nats per token")
    _title(change, "Held-out text against the base", "nats per token")
    changes = [
        {"step": row["step"]}
        | {name: row[HELD_OUT + name] - row[HELD_OUT_BASE + name] for name in names if HELD_OUT + name in row}
        for row in rows
    ]
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        _curve(text, rows, HELD_OUT + name, colour, name, smooth=False)
        _curve(text, rows, HELD_OUT_BASE + name, colour, dashed=True, smooth=False)
        _curve(change, changes, name, colour, name, smooth=False)
    change.axhline(0, color=GREY, linewidth=1)
    change.set_xlabel("step")


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
