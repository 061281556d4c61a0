"""How a layer's chosen experts become one: a strategy per file, pure functions.

A strategy's function is called once per layer as `(read, layer: LayerSelection, width, parameters, generator)`, where
`read(expert)` gives that expert's `ExpertWeights` anew at every call, and returns the merged expert in float32, `width`
neurons wide. It reads experts one at a time and keeps few, so that memory does not grow with their number.
"""

from nexus_core.merge.effect import Effect, expert_output, measure_effect
from nexus_core.merge.mean import MEAN
from nexus_core.merge.start import apply_start, start_factor
from nexus_core.merge.top1 import TOP1

STRATEGIES = [MEAN, TOP1]

__all__ = ["STRATEGIES", "Effect", "apply_start", "expert_output", "measure_effect", "start_factor"]
