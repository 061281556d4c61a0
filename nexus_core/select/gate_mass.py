"""How much weight experts receive."""

from __future__ import annotations

import numpy as np

from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy


def gate_mass(statistics: LayerStatistics, parameters: None, generator: np.random.Generator) -> Ranking:
    """Experts by their share of all gate weight.

        importance[e] = (sum over tokens of e's gate weight) / (the same, summed over all experts)

    Source: the average gate score of ESFT, arXiv 2407.01906, up to the constant that makes it sum to 1.
    """
    return Ranking(normalised(statistics.gate_mass))


GATE_MASS = Strategy(
    name="gate_mass",
    function=gate_mass,
    summary="by the gate weight they received",
    needs=frozenset({"gate_mass"}),
)
