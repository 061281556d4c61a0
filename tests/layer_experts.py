"""A layer of small random experts, as merge strategies get it, without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nexus_core.merge import STRATEGIES, LayerExperts, expert_output
from nexus_core.merge.experts import Rows
from nexus_core.select import LayerSelection
from nexus_core.statistics.saliency import LayerSaliency
from nexus_core.types import ExpertWeights, Strategy

EXPERTS, HIDDEN, WIDTH, INPUTS = 8, 12, 8, 20
SALIENCY_EF = np.random.default_rng(5).random((EXPERTS, WIDTH))


def random_expert(index: int, *, dtype: torch.dtype = torch.float32, has_biases: bool = True) -> ExpertWeights:
    """Numbers that bfloat16 holds exactly, so that types do not matter."""
    generator = torch.Generator().manual_seed(index)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(dtype)

    weights = ExpertWeights(normal(WIDTH, HIDDEN), normal(WIDTH, HIDDEN), normal(HIDDEN, WIDTH))
    if has_biases:
        weights.gate_bias, weights.up_bias, weights.down_bias = normal(WIDTH), normal(WIDTH), normal(HIDDEN)
    return weights


def layer_experts(
    read: Callable[[int], ExpertWeights] = random_expert,
    *,
    tiled: bool = False,
    dtype: torch.dtype = torch.float32,
    inputs: bool = False,
    saliency_EF: np.ndarray | None = None,
    kept_EF: np.ndarray | None = None,
) -> LayerExperts:
    """tiled: read by rows, as families that can; the answers must not differ."""

    def read_rows(expert: int, projection: str, rows: slice, dtype: torch.dtype | None) -> Rows:
        weights = read(expert)
        bias = getattr(weights, f"{projection}_bias")
        found = getattr(weights, projection)[rows], None if bias is None else bias[rows]
        return found if dtype is None else tuple(None if part is None else part.to(dtype) for part in found)

    return LayerExperts(
        count=EXPERTS,
        width=WIDTH,
        hidden_size=HIDDEN,
        has_biases=read(0).gate_bias is not None,
        dtype=dtype,
        read=read,
        activations=activation,
        read_rows=read_rows if tiled else None,
        inputs_ND=torch.randn(INPUTS, HIDDEN, generator=torch.Generator().manual_seed(99)) if inputs else None,
        saliency=None if saliency_EF is None else LayerSaliency(saliency_EF, kept_EF),
    )


def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def permuted(weights: ExpertWeights, order: torch.Tensor) -> ExpertWeights:
    """The same function with its neurons in another order."""
    return ExpertWeights(
        weights.gate[order],
        weights.up[order],
        weights.down[:, order],
        None if weights.gate_bias is None else weights.gate_bias[order],
        None if weights.up_bias is None else weights.up_bias[order],
        weights.down_bias,
    )


def strategy_of(name: str) -> Strategy:
    return next(strategy for strategy in STRATEGIES if strategy.name == name)


def merge(
    name: str,
    chosen: tuple[int, ...],
    experts: LayerExperts | None = None,
    width: int = WIDTH,
    importance: tuple[float, ...] = (),
    seed: int = 0,
    **parameters: object,
) -> ExpertWeights:
    strategy = strategy_of(name)
    layer = LayerSelection(layer=0, experts=chosen, importance=importance or (1 / EXPERTS,) * EXPERTS)
    model = strategy.parameters.model_validate(parameters) if strategy.parameters else None
    generator = torch.Generator().manual_seed(seed)
    experts = experts or layer_experts(saliency_EF=SALIENCY_EF)
    return strategy.function(experts, layer, width, model, generator)


def output_of(weights: ExpertWeights, hidden_TD: torch.Tensor) -> torch.Tensor:
    return expert_output(weights, hidden_TD, activation)
