"""Experts that explain the others' routing, one after the other."""

# E experts

from __future__ import annotations

import numpy as np

from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy

# Residual variance below this share of the largest variance is rounding.
NEGLIGIBLE = 1e-12


def diverse(statistics: LayerStatistics, parameters: None, generator: np.random.Generator) -> Ranking:
    """Experts such that the probabilities of the first k predict those of all others as well as can be, greedily.

    With R the covariance of the full softmax, still to be explained, the next expert is the one whose probability
    explains the most of it as the only regressor,

        e = argmax ||R[:, e]||^2 / R[e, e],    then    R <- R - R[:, e] R[e, :] / R[e, e]

    which is a step of the pivoted Cholesky decomposition, the pivot being chosen by all of the variance it explains
    rather than by its own. Two experts that do the same work are so never both among the first. importance[e] is the
    share of the total variance that e explained when it was taken; experts that nothing was left to explain for (the
    last one always: probabilities sum to 1) come last, by index.
    Source: Farahat et al., greedy column subset selection, arXiv 1312.6838.
    """
    residual_EE = np.array(statistics.covariance, dtype=np.float64)
    negligible = NEGLIGIBLE * max(residual_EE.diagonal().max(), 0.0)
    explained_E = np.zeros(statistics.experts)
    order: list[int] = []
    left_E = np.ones(statistics.experts, dtype=bool)
    while True:
        variance_E = residual_EE.diagonal()
        candidates = np.flatnonzero(left_E & (variance_E > negligible))
        if not len(candidates):
            break
        gains = np.square(residual_EE[:, candidates]).sum(axis=0) / variance_E[candidates]
        # Ties by index, also where rounding tells equals apart.
        expert = int(candidates[gains >= gains.max() * (1 - NEGLIGIBLE)][0])
        explained_E[expert] = gains.max()
        order.append(expert)
        left_E[expert] = False
        column_E = residual_EE[:, expert].copy()
        residual_EE -= np.outer(column_E, column_E) / column_E[expert]
    order += np.flatnonzero(left_E).tolist()
    return Ranking(normalised(explained_E), order=tuple(order))


DIVERSE = Strategy(
    name="diverse",
    function=diverse,
    summary="by how much of the others' routing they explain, one after the other",
    needs=frozenset({"covariance"}),
)
