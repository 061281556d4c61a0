"""How a layer's experts become one: a strategy per file, pure functions.

A strategy's function is called once per layer as `(experts: LayerExperts, layer: LayerSelection, width, parameters,
generator)` and returns the merged expert, `width` neurons wide, in any floating type; `experts(e)` gives expert e's
`ExpertWeights` anew at every call, and more is in `LayerExperts`. It reads experts one at a time and keeps few, so that
memory does not grow with their number. `Strategy.refuses` says beforehand which widths and parameters make no sense.
"""

from nexus_core.merge.aligned import ALIGNED
from nexus_core.merge.effect import Effect, expert_output, measure_effect
from nexus_core.merge.experts import LayerExperts, check_merged
from nexus_core.merge.mean import MEAN
from nexus_core.merge.neurons import NEURONS
from nexus_core.merge.random import RANDOM
from nexus_core.merge.start import apply_start, start_factor
from nexus_core.merge.top1 import TOP1
from nexus_core.merge.weighted import WEIGHTED

STRATEGIES = [MEAN, WEIGHTED, ALIGNED, NEURONS, TOP1, RANDOM]

__all__ = [
    "STRATEGIES",
    "Effect",
    "LayerExperts",
    "apply_start",
    "check_merged",
    "expert_output",
    "measure_effect",
    "start_factor",
]
