"""Pictures of a selection: how routing varies, which experts matter, and how few of them hold how much."""

# L layers, E experts, C components

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nexus_core.select.selection import MARKS, Selection, describe_top_k

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to this many layers each gets a line in the legend; more are told apart by a colour bar.
LEGEND_LAYERS = 8


def figures(selection: Selection) -> dict[str, Figure]:
    """All pictures of a selection by file name; without the explained variance if its strategy measures none."""
    pictures = {
        "importance": importance_by_rank(selection),
        "cumulative_importance": cumulative_importance(selection),
        "importance_map": importance_map(selection),
    }
    if any(layer.explained_variance for layer in selection.layers):
        pictures["variance_explained"] = variance_explained(selection)
    return pictures


def variance_explained(selection: Selection) -> Figure:
    """The share of the routing's total variance that the first components explain, one line a layer."""
    figure, axes = _axes("Variance of routing explained by its principal components")
    for color, layer in zip(_colors(selection), selection.layers, strict=True):
        shares_C = np.cumsum(layer.explained_variance)
        axes.plot(
            np.arange(1, len(shares_C) + 1),
            100 * shares_C,
            color=color,
            label=f"layer {layer.layer}",
            **_line(selection),
        )
    axes.set(xlabel="components", ylabel="explained variance, cumulative (%)", ylim=(0, 102))
    axes.set_xlim(left=0.5)
    axes.locator_params(axis="x", integer=True)
    _tell_layers_apart(figure, axes, selection)
    return figure


def importance_by_rank(selection: Selection) -> Figure:
    """Importance of all experts, most important first, one line a layer; what was chosen is solid, the rest faint."""
    figure, axes = _axes(f"Importance of all experts ({selection.strategy})")
    experts = selection.importance_LE.shape[1]
    for color, layer in zip(_colors(selection), selection.layers, strict=True):
        ranked_E = 100 * np.sort(layer.importance)[::-1]
        ranks, chosen = np.arange(1, experts + 1), len(layer.experts)
        style = _line(selection)
        axes.plot(ranks[:chosen], ranked_E[:chosen], color=color, label=f"layer {layer.layer}", **style)
        axes.plot(ranks[chosen - 1 :], ranked_E[chosen - 1 :], color=color, alpha=0.3, lw=style["lw"])
    axes.axhline(100 / experts, color="black", lw=1, ls=":")
    axes.annotate(
        f"all equal: {100 / experts:.2g}%",
        (experts, 100 / experts),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    axes.set(
        xlabel="rank of the expert in its layer (solid: chosen)", ylabel="importance (%)", xlim=(0.5, experts + 0.5)
    )
    axes.set_ylim(bottom=0)
    _tell_layers_apart(figure, axes, selection)
    return figure


def cumulative_importance(selection: Selection) -> Figure:
    """What the most important experts hold together, one line a layer, with the mean at 4, 8, 16 and 24 of them."""
    figure, axes = _axes(f"Importance that the top experts hold ({selection.strategy})")
    ranked_LE = np.sort(selection.importance_LE, axis=1)[:, ::-1]
    cumulative_LE = 100 * np.cumsum(ranked_LE, axis=1)
    layers, experts = cumulative_LE.shape
    ranks = np.arange(experts + 1)
    for color, layer, held_E in zip(_colors(selection), selection.layers, cumulative_LE, strict=True):
        axes.plot(
            ranks, [0, *held_E], color=color, label=f"layer {layer.layer}", **(_line(selection) | {"marker": None})
        )
    axes.plot([0, experts], [0, 100], color="black", lw=1, ls=":", label="all equal")
    for mark in (mark for mark in MARKS if mark <= experts):
        share = cumulative_LE[:, mark - 1].mean()
        axes.plot([mark, mark], [0, share], color="0.4", lw=1, ls="--")
        axes.plot(mark, share, "o", color="black", ms=5, zorder=3, label=f"top {mark}: {share:.0f}%")
    whose = "mean" if layers > 1 else "held"
    axes.set(
        xlabel=f"most important experts of the layer (dots: {whose} share)",
        ylabel="importance, cumulative (%)",
        xlim=(0, experts),
        ylim=(0, 102),
    )
    _tell_layers_apart(figure, axes, selection)
    return figure


def importance_map(selection: Selection) -> Figure:
    """Layers by experts: importance as a multiple of an equal share, with the chosen experts marked."""
    importance_LE = selection.importance_LE
    layers, experts = importance_LE.shape
    figure, axes = _axes(
        f"Importance of every expert ({selection.strategy}, top_k {describe_top_k(selection.top_k)})",
        size=(max(6.5, min(14, 2.5 + 0.1 * experts)), max(3.2, min(10, 1.6 + 0.22 * layers))),
    )
    multiples_LE = importance_LE * experts
    image = axes.imshow(multiples_LE, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    rows, columns = zip(
        *[(row, expert) for row, layer in enumerate(selection.layers) for expert in layer.experts], strict=True
    )
    # White on a dark rim, so that it shows on every colour.
    for color, width in (("black", 2.0), ("white", 0.9)):
        axes.scatter(columns, rows, s=max(4, min(40, 1500 / experts)), facecolor="none", edgecolor=color, lw=width)
    labelled = range(0, layers, -(-layers // 20))
    axes.set_yticks(list(labelled), [str(selection.layers[row].layer) for row in labelled])
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="expert (circle: chosen)", ylabel="layer")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="importance, times an equal share", pad=0.02)
    return figure


def _axes(title: str, size: tuple[float, float] = (8.0, 5.0)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colors(selection: Selection) -> list[tuple[float, ...]]:
    """A colour per layer, dark for the first to light for the last."""
    import matplotlib

    positions = np.linspace(0, 0.88, len(selection.layers)) if len(selection.layers) > 1 else [0.3]
    return [tuple(matplotlib.colormaps["viridis"](position)) for position in positions]


def _line(selection: Selection) -> dict[str, Any]:
    few = len(selection.layers) <= LEGEND_LAYERS
    return {"lw": 1.8, "marker": "o", "ms": 3.5} if few else {"lw": 1.0}


def _tell_layers_apart(figure: Figure, axes: Axes, selection: Selection) -> None:
    if len(selection.layers) <= LEGEND_LAYERS:
        axes.legend(frameon=False, fontsize=9)
        return
    others = [
        (line, label) for line, label in zip(*axes.get_legend_handles_labels(), strict=True) if "layer" not in label
    ]
    if others:
        axes.legend(*zip(*others, strict=True), frameon=False, fontsize=9)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    first, last = selection.layers[0].layer, selection.layers[-1].layer
    scale = ScalarMappable(Normalize(first, last), ListedColormap(_colors(selection)))
    figure.colorbar(scale, ax=axes, label="layer", pad=0.02)
