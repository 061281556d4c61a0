"""A draw: what every other strategy has to beat."""

from __future__ import annotations

import numpy as np

from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy


def random(statistics: LayerStatistics, parameters: None, generator: np.random.Generator) -> Ranking:
    """Experts in random order, whatever the router did: importance[e] is uniform on (0, 1), then made to sum to 1."""
    return Ranking(normalised(generator.random(statistics.experts)))


RANDOM = Strategy(name="random", function=random, summary="by lot, as a baseline")
