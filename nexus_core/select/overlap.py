"""How far several selections from the same statistics agree, and what the experts they choose stand for."""

# L layers, S strategies, E experts

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexus_core.errors import ShapeError
from nexus_core.select.ranking import LayerStatistics
from nexus_core.select.selection import Selection


def overlap(selections: Sequence[Selection]) -> np.ndarray:
    """Jaccard index of the experts that every two selections choose, by layer, (L, S, S): 1 where they are the same.

    |A and B| / |A or B|. Raises ShapeError if the selections are not of the same layers.
    """
    layers = [tuple(layer.layer for layer in selection.layers) for selection in selections]
    if len(set(layers)) != 1:
        raise ShapeError(f"selections of different layers cannot be compared: {sorted(set(layers))}")
    chosen_LS = [
        [frozenset(layer.experts) for layer in of_layer]
        for of_layer in zip(*(selection.layers for selection in selections), strict=True)
    ]
    return np.array([[[len(a & b) / len(a | b) for b in row] for a in row] for row in chosen_LS])


def overlap_by_chance(experts: int, first: float, second: float) -> float:
    """Jaccard index that two random choices of `first` and `second` of E experts have, as a ratio of expectations."""
    both = first * second / experts
    return both / (first + second - both)


def routed_share(statistics: LayerStatistics, experts: Sequence[int]) -> float:
    """Share of the layer's routing decisions that went to these experts."""
    return float(statistics.topk_count[list(experts)].sum() / max(statistics.topk_count.sum(), 1))


def explained_share(statistics: LayerStatistics, experts: Sequence[int]) -> float:
    """Share of the routing's variance that linear regression on these experts' probabilities explains.

    With C the covariance and S the experts, trace(C[:, S] C[S, S]^+ C[S, :]) / trace(C); 1 if nothing varies.
    """
    chosen = list(experts)
    covariance_EE = statistics.covariance
    total = float(np.trace(covariance_EE))
    if total <= 0:
        return 1.0
    inverse_SS = np.linalg.pinv(covariance_EE[np.ix_(chosen, chosen)], hermitian=True)
    return float(np.trace(covariance_EE[:, chosen] @ inverse_SS @ covariance_EE[chosen]) / total)
