"""Routed experts that stay MXFP4: decoded on the way forward, and again on the way back, by one of the backends.

# T tokens, D hidden size, F expert width, E experts, K experts per token
# R = T * K rows, one per token and chosen expert, sorted by expert, then token
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nexus_core.additions import Activation
from nexus_core.types import ExpertWeights
from nexus_gpt_oss.backends.choice import Sizes, backend_for
from nexus_gpt_oss.backends.rows import Experts, Kept, Needs, PackedMatrix, Routing, sort_by_expert
from nexus_gpt_oss.checkpoint import dense
from nexus_gpt_oss.mxfp4 import GROUP, GROUP_BYTES


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """GPT-OSS's activation: (up + 1) * gate * sigmoid(alpha * gate), both clamped first.

    gate, up: same shape, which the answer has too; gate is clamped above at limit, up to [-limit, limit].
    """
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class PackedExperts(nn.Module):
    """The routed experts of one layer, frozen, as the official checkpoint stores them.

    Gives (T, D) for hidden states (T, D), expert indices (T, K) and gate weights (T, K): the weighted sum of each
    token's experts, in the order of operations of transformers' GptOssExperts, computed in the type of the hidden
    states. Gradients reach hidden states and gate weights, never the experts. How much of them is dense at a time,
    `nexus_gpt_oss.backends` says: on a CPU one matrix of one expert. Raises ShapeError for an expert index outside 0 to
    E - 1.
    """

    def __init__(self, *, experts: int, hidden_size: int, width: int, alpha: float, limit: float):
        super().__init__()
        self.expert_count, self.hidden_size, self.width = experts, hidden_size, width
        self.activation: Activation = partial(swiglu, alpha=alpha, limit=limit)
        # Rows of gate_up alternate: gate 0, up 0, gate 1, up 1 and so on.
        self.gate_up_proj_blocks = _frozen_bytes(experts, 2 * width, hidden_size // GROUP, GROUP_BYTES)
        self.gate_up_proj_scales = _frozen_bytes(experts, 2 * width, hidden_size // GROUP)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * width), requires_grad=False)
        self.down_proj_blocks = _frozen_bytes(experts, hidden_size, width // GROUP, GROUP_BYTES)
        self.down_proj_scales = _frozen_bytes(experts, hidden_size, width // GROUP)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden_size), requires_grad=False)

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        trains = torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad)
        return _PackedForward.apply(
            hidden_TD,
            weights_TK,
            indices_TK,
            self.gate_up_proj_blocks,
            self.gate_up_proj_scales,
            self.gate_up_proj_bias,
            self.down_proj_blocks,
            self.down_proj_scales,
            self.down_proj_bias,
            self.activation,
            trains,
        )

    def dense(self, expert: int, dtype: torch.dtype) -> ExpertWeights:
        """One expert's numbers, decoded, in canonical layout."""
        gate_up = dense(self.gate_up_proj_blocks[expert], self.gate_up_proj_scales[expert], dtype)
        gate_up_bias = self.gate_up_proj_bias[expert].detach().to(dtype)
        return ExpertWeights(
            gate=gate_up[0::2],
            up=gate_up[1::2],
            down=dense(self.down_proj_blocks[expert], self.down_proj_scales[expert], dtype),
            gate_bias=gate_up_bias[0::2],
            up_bias=gate_up_bias[1::2],
            down_bias=self.down_proj_bias[expert].detach().to(dtype),
        )

    def extra_repr(self) -> str:
        return f"experts={self.expert_count}, hidden_size={self.hidden_size}, width={self.width}, storage=mxfp4"


class _PackedForward(torch.autograd.Function):
    """Saves the packed parameters themselves (not slices: a sharded parameter may be replaced in between), and what the
    backend keeps by row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        indices_TK: torch.Tensor,
        gate_up_blocks: torch.Tensor,
        gate_up_scales: torch.Tensor,
        gate_up_bias: torch.Tensor,
        down_blocks: torch.Tensor,
        down_scales: torch.Tensor,
        down_bias: torch.Tensor,
        activation: Activation,
        trains: bool,
    ) -> torch.Tensor:
        gate_up = PackedMatrix(gate_up_blocks, gate_up_scales, gate_up_bias)
        down = PackedMatrix(down_blocks, down_scales, down_bias)
        routing = sort_by_expert(indices_TK, len(gate_up_blocks))
        sizes = Sizes(len(gate_up_blocks), gate_up.inputs, down.inputs)
        backend = backend_for(hidden_TD.device, hidden_TD.dtype, sizes, len(routing.order_R))
        needs = Needs(hidden=trains and ctx.needs_input_grad[0], weights=trains and ctx.needs_input_grad[1])
        found = backend.forward(Experts(gate_up, down, activation), routing, hidden_TD, weights_TK, needs)
        ctx.backend, ctx.activation, ctx.counts, ctx.needs = backend, activation, routing.counts, needs
        ctx.save_for_backward(
            weights_TK,
            routing.order_R,
            found.kept.gate_up_RF,
            found.kept.outputs_RD,
            gate_up_blocks,
            gate_up_scales,
            gate_up_bias,
            down_blocks,
            down_scales,
            down_bias,
        )
        return found.summed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights_TK, order_R, gate_up_RF, outputs_RD, *packed = ctx.saved_tensors
        routing = Routing(ctx.counts, order_R, weights_TK.shape[1])
        experts = Experts(PackedMatrix(*packed[:3]), PackedMatrix(*packed[3:]), ctx.activation)
        kept = Kept(gate_up_RF, outputs_RD)
        found = ctx.backend.backward(experts, routing, grad_TD, weights_TK, kept, ctx.needs)
        return found.hidden_TD, found.weights_TK, *(None,) * 9


def _frozen_bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
