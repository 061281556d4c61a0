"""How much experts put out."""

from __future__ import annotations

import numpy as np

from nexus_core.errors import ShapeError
from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy


def saliency(statistics: LayerStatistics, parameters: None, generator: np.random.Generator) -> Ranking:
    """Experts by what they add to the layer's output, on average over the tokens that were routed to them.

        importance[e]  proportional to  mean over e's tokens of (gate weight of e) * ||output of e||

    with 0 for an expert that no token was routed to. An expert that speaks loudly counts, however seldom it is asked.
    Raises ShapeError if the statistics hold no norms of outputs.
    Source: REAP, arXiv 2510.13999, but for the constant that makes it sum to 1.
    """
    if statistics.output_norm_sum is None:
        raise ShapeError(f"layer {statistics.layer}: the statistics hold no norms of the experts' outputs")
    return Ranking(normalised(statistics.output_norm_sum / np.maximum(statistics.topk_count, 1)))


SALIENCY = Strategy(
    name="saliency",
    function=saliency,
    summary="by gate weight times norm of their output, mean over their tokens (REAP)",
    needs=frozenset({"expert_norms", "topk_count"}),
)
