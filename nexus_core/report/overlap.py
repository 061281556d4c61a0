"""Pictures of how far several selections from the same statistics agree."""

# L layers, E experts, S strategies

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, cycle
from typing import TYPE_CHECKING

import numpy as np

from nexus_core.select.overlap import overlap, overlap_by_chance
from nexus_core.select.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More pairs than this are too many lines to tell apart; then only those with the first strategy are drawn.
LINES = 6


def comparison_figures(selections: Mapping[str, Selection]) -> dict[str, Figure]:
    """All pictures of a comparison by file name. selections: by the name each goes by, of the same layers."""
    return {
        "overlap": overlap_map(selections),
        "overlap_by_layer": overlap_by_layer(selections),
        "chosen_experts": chosen_experts(selections),
    }


def overlap_map(selections: Mapping[str, Selection]) -> Figure:
    """Strategies by strategies: the share of experts that both choose, mean over the layers."""
    names = list(selections)
    overlap_SS = overlap(list(selections.values())).mean(axis=0)
    size = 2.8 + 0.75 * len(names)
    figure, axes = _axes("Experts that both choose, of all that either does", (size + 1.2, size))
    image = axes.imshow(100 * overlap_SS, cmap="viridis", vmin=0, vmax=100)
    for row, column in np.ndindex(overlap_SS.shape):
        share = 100 * overlap_SS[row, column]
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if share > 60 else "white")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="Jaccard index, mean over layers (%)", pad=0.03, shrink=0.85)
    return figure


def overlap_by_layer(selections: Mapping[str, Selection]) -> Figure:
    """The same by layer, a line for every two strategies, or for the first with every other, and what chance gives."""
    import matplotlib

    names, chosen = list(selections), list(selections.values())
    overlap_LSS = overlap(chosen)
    layers = [layer.layer for layer in chosen[0].layers]
    pairs = list(combinations(range(len(names)), 2))
    title = "Experts that both choose, by layer"
    if len(pairs) > LINES:
        pairs = [pair for pair in pairs if pair[0] == 0]
        title = f"Experts that both {names[0]} and another choose, by layer"
    pairs.sort(key=lambda pair: -overlap_LSS[:, pair[0], pair[1]].mean())
    figure, axes = _axes(title, (8.5, 4.8))
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for color, (a, b) in zip(cycle(colors), pairs, strict=False):
        shares_L = 100 * overlap_LSS[:, a, b]
        label = f"{names[a]}, {names[b]}: {shares_L.mean():.0f}%"
        axes.plot(layers, shares_L, color=color, lw=1.6, marker="o", ms=3.5, label=label)
    experts = len(chosen[0].layers[0].importance)
    counts = [float(np.mean([len(layer.experts) for layer in selection.layers])) for selection in chosen]
    chance = float(np.mean([overlap_by_chance(experts, counts[a], counts[b]) for a, b in pairs]))
    axes.axhline(100 * chance, color="black", lw=1, ls=":", label=f"by chance: {100 * chance:.0f}%")
    axes.set(xlabel="layer", ylabel="Jaccard index (%)", ylim=(0, 103))
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def chosen_experts(selections: Mapping[str, Selection]) -> Figure:
    """Layers by experts: how many of the strategies choose each, so that what all agree on stands out."""
    import matplotlib

    chosen = list(selections.values())
    layers, experts = chosen[0].importance_LE.shape
    votes_LE = np.zeros((layers, experts), dtype=int)
    for selection in chosen:
        for row, layer in enumerate(selection.layers):
            votes_LE[row, list(layer.experts)] += 1
    size = (max(6.5, min(14, 2.5 + 0.1 * experts)), max(3.2, min(10, 1.6 + 0.22 * layers)))
    figure, axes = _axes(f"How many of the {len(chosen)} strategies choose each expert", size)
    colors = matplotlib.colormaps["viridis"].resampled(len(chosen) + 1)
    image = axes.imshow(
        votes_LE, aspect="auto", cmap=colors, vmin=-0.5, vmax=len(chosen) + 0.5, interpolation="nearest"
    )
    labelled = range(0, layers, -(-layers // 20))
    axes.set_yticks(list(labelled), [str(chosen[0].layers[row].layer) for row in labelled])
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="strategies", ticks=range(len(chosen) + 1), pad=0.02)
    return figure


def _axes(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
