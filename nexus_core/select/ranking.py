"""What a selection strategy gets and what it returns."""

# E experts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexus_core.errors import ShapeError


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's router did over `tokens` tokens.

    mean (E,) and covariance (E, E): of the full softmax over all experts, unbiased, float64. topk_count (E,): tokens
    that were routed to each expert. gate_mass (E,): sum of the gate weights each expert received.
    """

    layer: int
    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    topk_count: np.ndarray
    gate_mass: np.ndarray

    @property
    def experts(self) -> int:
        """E, how many experts the layer has."""
        return len(self.mean)


@dataclass(frozen=True)
class Ranking:
    """How important each expert of a layer is.

    importance (E,): not negative, sums to 1. explained_variance: for strategies that decompose the routing, the share
    of its total variance that each component explains, largest first; empty for the others.
    """

    importance: np.ndarray
    explained_variance: tuple[float, ...] = ()


def normalised(scores_E: np.ndarray) -> np.ndarray:
    """Scores as shares that sum to 1; equal shares if all scores are zero, for then nothing tells experts apart.

    Raises ShapeError if a score is negative or not finite: the statistics are damaged.
    """
    scores_E = np.asarray(scores_E, dtype=np.float64)
    if not np.isfinite(scores_E).all() or (scores_E < 0).any():
        raise ShapeError("an expert's score is negative or not finite; the statistics are damaged, run collect again")
    total = scores_E.sum()
    return scores_E / total if total > 0 else np.full(len(scores_E), 1 / len(scores_E))
