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
    that were routed to each expert. gate_mass (E,): sum of the gate weights each expert received. output_norm_sum (E,):
    sum over each expert's tokens of its gate weight times the norm of its output, None if collect did not gather it.
    wanted: how many experts will be chosen, None where that depends on the ranking.
    """

    layer: int
    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    topk_count: np.ndarray
    gate_mass: np.ndarray
    output_norm_sum: np.ndarray | None = None
    wanted: int | None = None

    @property
    def experts(self) -> int:
        """E, how many experts the layer has."""
        return len(self.mean)


@dataclass(frozen=True)
class Ranking:
    """How important each expert of a layer is.

    importance (E,): not negative, sums to 1. explained_variance: for strategies that decompose the routing, the share
    of its total variance that each component explains, largest first; empty for the others. order: all experts, first
    to last, for strategies that choose one after the other; by importance, ties by index, if left out.
    """

    importance: np.ndarray
    explained_variance: tuple[float, ...] = ()
    order: tuple[int, ...] | None = None


def normalised(scores_E: np.ndarray) -> np.ndarray:
    """Scores as shares that sum to 1; equal shares if all scores are zero, for then nothing tells experts apart.

    Raises ShapeError if a score is negative or not finite: the statistics are damaged.
    """
    scores_E = np.asarray(scores_E, dtype=np.float64)
    if not np.isfinite(scores_E).all() or (scores_E < 0).any():
        raise ShapeError("an expert's score is negative or not finite; the statistics are damaged, run collect again")
    total = scores_E.sum()
    return scores_E / total if total > 0 else np.full(len(scores_E), 1 / len(scores_E))
