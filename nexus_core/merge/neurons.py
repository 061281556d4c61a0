"""The most salient neurons of a layer, whatever expert they come from.

# E experts, F expert width, W width of the shared expert
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.errors import UsageError
from nexus_core.merge.experts import PROJECTIONS, LayerExperts
from nexus_core.select.selection import LayerSelection
from nexus_core.statistics.saliency import NEED
from nexus_core.types import ExpertWeights, MergeRequest, Refusal, Strategy


class NeuronsParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    pool: Literal["layer", "selected"] = Field(
        "layer", description="Where neurons are taken from: all experts of the layer, or the selected ones."
    )
    contrast: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="How much of a neuron's saliency on the sets that are kept is subtracted from that on the sets "
        "that are learnt: 0 ignores what is kept, 1 counts both alike.",
    )


def neurons(
    experts: LayerExperts,
    layer: LayerSelection,
    width: int,
    parameters: NeuronsParameters,
    generator: torch.Generator,
) -> ExpertWeights:
    """The `width` neurons that matter most to the text to be learnt, with their own rows and columns, unchanged.

    Saliency of neuron f of expert e: sum over the tokens routed to e of gate weight x |activation| x norm of the
    neuron's column of down, per token of the learnt sets; with `contrast` c less c times the same of the kept sets. The
    greatest are taken, of all experts or the selected ones, ties by expert, then neuron; they lie side by side in that
    order. Any width up to all neurons there are. Of an expert's output bias its chosen neurons bring their share, so
    all neurons of one expert alone are that expert. Source of the measure: REAP's saliency (gate weight x size of the
    output, arXiv 2510.13999), per neuron instead of per expert.
    """
    if experts.saliency is None:
        raise UsageError(
            "merge 'neurons' needs neuron saliency, and there is none; collect with expert_norms and name that folder "
            "(--statistics)"
        )
    pool = range(experts.count) if parameters.pool == "layer" else sorted(layer.experts)
    if width > len(pool) * experts.width:
        raise UsageError(f"layer {layer.layer}: {_too_wide(width, len(pool), experts.width)}")
    chosen = most_salient(experts.saliency.contrasted(parameters.contrast), pool, width)

    merged = experts.blank(width)
    output_bias_D = torch.zeros(experts.hidden_size)
    start = 0
    for expert, taken in chosen.items():
        place = slice(start, start + len(taken))
        _copy_inputs(experts, expert, taken, merged, start)
        for tile in experts.tiles("down"):
            matrix, bias = experts.rows(expert, "down", tile)
            merged.down[tile, place] = matrix[:, taken].to(experts.dtype)
            if bias is not None:
                output_bias_D[tile] += bias.float() * (len(taken) / experts.width)
        start = place.stop
    if merged.down_bias is not None:
        merged.down_bias.copy_(output_bias_D)
    return merged


def most_salient(saliency_EF: np.ndarray, pool: Sequence[int], width: int) -> dict[int, list[int]]:
    """The neurons of greatest saliency by expert, both ascending; ties by expert, then neuron."""
    flat = saliency_EF[list(pool)].ravel()
    neurons_per_expert = saliency_EF.shape[1]
    chosen: dict[int, list[int]] = {}
    for place in np.sort(np.argsort(-flat, kind="stable")[:width]):
        chosen.setdefault(pool[place // neurons_per_expert], []).append(int(place % neurons_per_expert))
    return chosen


def _copy_inputs(experts: LayerExperts, expert: int, taken: list[int], merged: ExpertWeights, start: int) -> None:
    """Rows of gate and up, and their biases, read in stretches that hold some of the wanted neurons."""
    for projection in PROJECTIONS[:2]:
        for rows, which in experts.runs(taken):
            matrix, bias = experts.rows(expert, projection, rows)
            within = [neuron - rows.start for neuron in taken[which]]
            place = slice(start + which.start, start + which.stop)
            getattr(merged, projection)[place] = matrix[within].to(experts.dtype)
            if bias is not None:
                getattr(merged, f"{projection}_bias")[place] = bias[within].to(experts.dtype)


def refuse(request: MergeRequest, parameters: NeuronsParameters) -> Refusal | None:
    """Where there are too few neurons, or no statistics of the text that they are chosen by."""
    pool = request.experts if parameters.pool == "layer" else request.chosen
    if pool is not None and request.width > pool * request.expert_width:
        return Refusal("width", _too_wide(request.width, pool, request.expert_width))
    if request.learnt is not None and not request.learnt:
        return Refusal(
            "merge",
            "is neurons, those most active on the text that is learnt, but collect.data holds none of those sets; "
            "add one (train.learn says which they are)",
        )
    if request.kept is not None and not request.kept and parameters.contrast:
        return Refusal(
            "contrast",
            f"is {parameters.contrast:g}, of the saliency on sets that are kept, but statistics are collected over "
            "none; add one to collect.data, or write 0",
        )
    return None


def _too_wide(width: int, experts: int, expert_width: int) -> str:
    return (
        f"is {width}, but {experts} experts have only {experts * expert_width} neurons to take; write at most that, or "
        "take them from all experts of the layer (pool: layer)"
    )


NEURONS = Strategy(
    name="neurons",
    function=neurons,
    summary="the neurons that matter most to what is learnt, of whatever expert, in any number",
    parameters=NeuronsParameters,
    needs=frozenset({NEED}),
    refuses=refuse,
)
