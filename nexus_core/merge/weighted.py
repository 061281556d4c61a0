"""The average of the chosen experts, each as heavy as it is important."""

from __future__ import annotations

import torch

from nexus_core.errors import SelectionError
from nexus_core.merge.combine import combine, refuse_empty_blocks
from nexus_core.merge.experts import LayerExperts
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, Strategy

# The weight of an expert of no importance at all, as a share of the largest.
LEAST = 1e-9


def weighted(
    experts: LayerExperts, layer: LayerSelection, width: int, parameters: None, generator: torch.Generator
) -> ExpertWeights:
    """As `mean`, with every expert weighted by its importance in the selection: W = sum of i_e W_e / sum of i_e.

    Where all chosen experts have the same importance, or none has any, it is the mean. Biases and widths as for `mean`;
    of several blocks side by side each counts by the importance of its experts. Raises SelectionError if the
    selection says nothing of importance.
    """
    if not layer.importance:
        raise SelectionError(
            f"layer {layer.layer} of the selection has no importance, which merge 'weighted' weighs its experts by; "
            "make the selection with `nexus select`, or take merge 'mean'"
        )
    largest = max(layer.importance[expert] for expert in layer.experts) or 1.0
    # Never quite nothing, so that a block of unimportant experts has an average.
    return combine(experts, {e: max(layer.importance[e], largest * LEAST) for e in layer.experts}, width)


WEIGHTED = Strategy(
    name="weighted",
    function=weighted,
    summary="the average of the chosen experts, weighted by their importance",
    refuses=refuse_empty_blocks,
)
