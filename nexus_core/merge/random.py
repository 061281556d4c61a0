"""Random neurons of the right size: what an informed start has to beat.

# D hidden size, F expert width, R rows that are drawn
"""

from __future__ import annotations

import torch

from nexus_core.merge.experts import PROJECTIONS, LayerExperts, Projection
from nexus_core.select.selection import LayerSelection
from nexus_core.types import ExpertWeights, Strategy


def random(
    experts: LayerExperts, layer: LayerSelection, width: int, parameters: None, generator: torch.Generator
) -> ExpertWeights:
    """Normal random numbers, scaled so that every vector is as long as the one it stands for in a chosen expert.

    Neuron i's rows of gate and up and column of down get the norms of neuron i mod F of the chosen expert of rank
    floor(i / F), counted around again when there are no more; down is divided by the number of experts so used. Biases,
    as vectors, are as long as those experts', that of down as the first one's. Any width. A full start of it is noise:
    meant for a zero start, where the numbers of down do not count.
    """
    merged = experts.blank(width)
    blocks = -(-width // experts.width)
    for block in range(blocks):
        expert = layer.experts[block % len(layer.experts)]
        neurons = slice(block * experts.width, min((block + 1) * experts.width, width))
        count = neurons.stop - neurons.start
        for projection in PROJECTIONS:
            norms_F, bias_norm = _norms(experts, expert, projection)
            drawn_RD = _vectors(norms_F[:count], experts.hidden_size, generator)
            bias = getattr(merged, f"{projection}_bias")
            if projection == "down":
                merged.down[:, neurons] = drawn_RD.div_(blocks).T.to(experts.dtype)
                if bias is not None and block == 0:
                    bias[:] = _vectors(bias_norm, experts.hidden_size, generator)[0]
                continue
            getattr(merged, projection)[neurons] = drawn_RD.to(experts.dtype)
            if bias is not None:
                # As long as the part of the expert's bias that this many of its neurons would have.
                bias[neurons] = _vectors(bias_norm * (count / experts.width) ** 0.5, count, generator)[0]
    return merged


def _vectors(norms_R: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors (R, size) of these norms and any direction."""
    drawn = torch.randn(len(norms_R), size, generator=generator)
    return drawn.mul_((norms_R / torch.linalg.vector_norm(drawn, dim=1))[:, None])


def _norms(experts: LayerExperts, expert: int, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of every neuron's row of gate or up, or column of down, (F,) float32, and of the bias (1,)."""
    squares_F, bias_square = torch.zeros(experts.width), torch.zeros(1)
    for tile in experts.tiles(projection):
        matrix, bias = experts.rows(expert, projection, tile)
        if projection == "down":
            squares_F += matrix.float().square().sum(dim=0)
        else:
            squares_F[tile] = matrix.float().square().sum(dim=1)
        if bias is not None:
            bias_square += bias.float().square().sum()
    return squares_F.sqrt_(), bias_square.sqrt_()


RANDOM = Strategy(name="random", function=random, summary="random neurons with the norms of the chosen experts' own")
