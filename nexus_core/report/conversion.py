"""A picture of a conversion: what the merged experts do to their layers' outputs."""

# L layers

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nexus_core.merge.effect import Effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, COSINE = "tab:blue", "tab:green"

# Up to this many layers each point gets a mark.
MARKED_LAYERS = 24


def output_change(effects: Mapping[int, Effect], merge: str, factor: float) -> Figure:
    """Size of the merged experts' outputs beside the routed experts', and the cosine between them, layer by layer.

    effects: at full start. factor: what the start makes of them, drawn too where it is not 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.6), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    layers = list(effects)
    style = {"marker": "o", "ms": 4} if len(layers) <= MARKED_LAYERS else {}

    changes_L = [100 * effect.relative_change for effect in effects.values()]
    above.plot(layers, changes_L, color=SIZE, lw=1.8, label="full start", **style)
    if factor != 1:
        started_L = [abs(factor) * change for change in changes_L]
        above.plot(layers, started_L, color="black", lw=1.4, ls="--", label=f"as converted (start {factor:g})")
        above.legend(frameon=False, fontsize=9)
    above.set_ylim(bottom=0 if factor else -0.04 * max(changes_L), top=1.12 * max(changes_L))
    above.set_ylabel("size beside the\nrouted output (%)")

    cosines_L = [effect.cosine for effect in effects.values()]
    below.plot(layers, cosines_L, color=COSINE, lw=1.8, **style)
    below.axhline(0, color="black", lw=1, ls=":")
    below.set(xlabel="layer", ylabel="cosine to the\nrouted output", ylim=(min(-0.1, *cosines_L) - 0.05, 1.05))
    below.locator_params(axis="x", integer=True)
    if len(layers) == 1:
        below.set_xticks(layers)

    for axes in (above, below):
        _plain(axes)
    above.set_title(f"What the merged experts put out ({merge})", loc="left", fontsize=11, fontweight="bold")
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
