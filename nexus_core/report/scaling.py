"""A picture of how a cost grows with sizes, one panel a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]


def scaling_picture(panels: Mapping[str, Mapping[str, Curve]], cost: str) -> Figure:
    """panels: by what grows, and in each by what is measured, (size, cost) points. cost: what that is, and its unit.

    Both axes are logarithmic, so that a cost that grows with a size is a straight line of slope one, drawn in grey.
    """
    from matplotlib.figure import Figure

    costs = [y for curves in panels.values() for curve in curves.values() for _, y in curve]
    lowest, highest = min(costs) / 1.3, max(costs) * 1.3
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if lowest <= tick <= highest]
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    for place, (size, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for name, curve in curves.items():
            xs, ys = zip(*curve, strict=True)
            axes.plot(xs, ys, marker="o", markersize=4, color=f"C{names.index(name)}", label=name)
        sizes = sorted({x for curve in curves.values() for x, _ in curve})
        first = min(curve[0][1] for curve in curves.values())
        axes.plot(
            sizes, [first * x / sizes[0] for x in sizes], color="0.75", linewidth=1, zorder=0, label="in proportion"
        )
        axes.set_xticks(sizes, [f"{x:,.0f}" for x in sizes])
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        axes.set_ylim(lowest, highest)
        axes.minorticks_off()
        axes.set_xlabel(size)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        if place == 0:
            axes.set_ylabel(cost)
            axes.legend(frameon=False, fontsize="small")
    return figure
