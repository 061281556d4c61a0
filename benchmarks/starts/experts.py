"""Routed experts held dense, for the methods that train them: the same numbers as the packed ones, to the bit.

# T tokens, D hidden size, F expert width, E experts, K experts per token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class DenseExperts(nn.Module):
    """One layer's experts in float32, in the place of the packed ones; its parameters can learn or carry LoRA.

    Everything that is compared computes with these, so that no method pays for, or gains from, how another one's
    experts are stored.
    """

    def __init__(self, packed: Any):
        super().__init__()
        experts = [packed.dense(expert, torch.float32) for expert in range(packed.expert_count)]
        self.gate_up = nn.Parameter(torch.stack([torch.cat([e.gate, e.up]) for e in experts]))
        self.gate_up_bias = nn.Parameter(torch.stack([torch.cat([e.gate_bias, e.up_bias]) for e in experts]))
        self.down = nn.Parameter(torch.stack([e.down.clone() for e in experts]))
        self.down_bias = nn.Parameter(torch.stack([e.down_bias for e in experts]))
        self.activation = packed.activation

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        order_R = torch.argsort(indices_TK.flatten(), stable=True)
        counts = torch.bincount(indices_TK.flatten(), minlength=len(self.down)).tolist()
        tokens_R = order_R // indices_TK.shape[1]
        gate_up = _by_expert(hidden_TD[tokens_R], counts, self.gate_up, self.gate_up_bias)
        gate, up = gate_up.chunk(2, dim=-1)
        output = _by_expert(self.activation(gate, up), counts, self.down, self.down_bias)
        weighted = output * weights_TK.flatten()[order_R, None]
        return torch.zeros_like(hidden_TD).index_add(0, tokens_R, weighted)


def _by_expert(rows: torch.Tensor, counts: list[int], weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Rows, sorted by expert, each times its expert's matrix."""
    parts = zip(rows.split(counts), weights.unbind(), biases.unbind(), strict=True)
    return torch.cat([functional.linear(part, weight, bias) for part, weight, bias in parts])


def hold_dense(model: nn.Module) -> None:
    """Put dense experts in the place of every layer's packed ones, frozen."""
    for block in list(model.modules()):
        packed = getattr(block, "experts", None)
        if isinstance(packed, nn.Module) and not isinstance(packed, DenseExperts):
            block.experts = DenseExperts(packed).requires_grad_(False)
