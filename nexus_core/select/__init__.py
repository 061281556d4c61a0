"""Which of a layer's experts its shared expert is built from: one strategy per file, pure functions.

A strategy's function is called once per layer as `(statistics: LayerStatistics, parameters, generator)` and returns a
`Ranking`: the importance of every expert. How many of them are taken, and what that importance says about the layer,
is the same for all strategies: `selection.choose_experts`.
"""

from nexus_core.select.diverse import DIVERSE
from nexus_core.select.frequency import FREQUENCY
from nexus_core.select.gate_mass import GATE_MASS
from nexus_core.select.kmeans import KMEANS
from nexus_core.select.pca import PCA
from nexus_core.select.random import RANDOM
from nexus_core.select.ranking import LayerStatistics, Ranking
from nexus_core.select.saliency import SALIENCY
from nexus_core.select.selection import LayerSelection, Selection, choose_experts, read_selection, write_selection

STRATEGIES = [PCA, FREQUENCY, GATE_MASS, SALIENCY, DIVERSE, KMEANS, RANDOM]

__all__ = [
    "STRATEGIES",
    "LayerSelection",
    "LayerStatistics",
    "Ranking",
    "Selection",
    "choose_experts",
    "read_selection",
    "write_selection",
]
