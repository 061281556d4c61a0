"""How often experts are chosen."""

from __future__ import annotations

import numpy as np

from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy


def frequency(statistics: LayerStatistics, parameters: None, generator: np.random.Generator) -> Ranking:
    """Experts by the share of routing decisions that went to them.

        importance[e] = (tokens with e among their top k) / (k * tokens)

    Source: the token selection ratio of ESFT, arXiv 2407.01906.
    """
    return Ranking(normalised(statistics.topk_count))


FREQUENCY = Strategy(
    name="frequency",
    function=frequency,
    summary="by how many tokens chose them",
    needs=frozenset({"topk_count"}),
)
