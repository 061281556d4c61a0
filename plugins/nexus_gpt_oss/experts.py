"""Routed experts that stay MXFP4: decoded one at a time on the way forward, and again on the way back.

# T tokens, D hidden size, F expert width, E experts, K experts per token
# R = T * K rows, one per token and chosen expert, sorted by expert, then token
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nexus_core.additions import Activation
from nexus_core.errors import ShapeError
from nexus_core.types import ExpertWeights
from nexus_gpt_oss.mxfp4 import GROUP, GROUP_BYTES, PAIR_TYPES, decode


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
    states. Gradients reach hidden states and gate weights, never the experts. At no time is more than one expert
    dense. Raises ShapeError for an expert index outside 0 to E - 1.
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
        gate_up = _DecodedExpert(self.gate_up_proj_blocks, self.gate_up_proj_scales, dtype)(expert)
        gate_up_bias = self.gate_up_proj_bias[expert].detach().to(dtype)
        return ExpertWeights(
            gate=gate_up[0::2],
            up=gate_up[1::2],
            down=_DecodedExpert(self.down_proj_blocks, self.down_proj_scales, dtype)(expert),
            gate_bias=gate_up_bias[0::2],
            up_bias=gate_up_bias[1::2],
            down_bias=self.down_proj_bias[expert].detach().to(dtype),
        )

    def extra_repr(self) -> str:
        return f"experts={self.expert_count}, hidden_size={self.hidden_size}, width={self.width}, storage=mxfp4"


class _PackedForward(torch.autograd.Function):
    """Saves the packed parameters themselves (not slices: a sharded parameter may be replaced in between), the
    experts' inputs to the activation (R, 2F), and, where the gate weights learn, the experts' outputs (R, D)."""

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
        dtype = hidden_TD.dtype
        counts, order_R = _sort_by_expert(indices_TK, gate_up_blocks.shape[0])
        tokens_R = order_R // indices_TK.shape[1]
        weights_R = weights_TK.reshape(-1)[order_R]
        gate_up_weight = _DecodedExpert(gate_up_blocks, gate_up_scales, dtype)
        down_weight = _DecodedExpert(down_blocks, down_scales, dtype)
        keeps_outputs = trains and ctx.needs_input_grad[1]
        kept_gate_up = hidden_TD.new_empty((len(order_R), gate_up_bias.shape[1])) if trains else None
        kept_outputs = hidden_TD.new_empty((len(order_R), hidden_TD.shape[1])) if keeps_outputs else None

        summed_TD = torch.zeros_like(hidden_TD)
        for expert, rows in _rows_by_expert(counts):
            tokens = tokens_R[rows]
            # In two steps, as transformers does: a fused bias would be rounded differently.
            gate_up = (hidden_TD[tokens] @ gate_up_weight(expert).T).add_(gate_up_bias[expert].to(dtype))
            activated = activation(gate_up[:, 0::2].contiguous(), gate_up[:, 1::2].contiguous())
            output = (activated @ down_weight(expert).T).add_(down_bias[expert].to(dtype))
            summed_TD.index_add_(0, tokens, (output * weights_R[rows, None]).to(dtype))
            if kept_gate_up is not None:
                kept_gate_up[rows] = gate_up
            if kept_outputs is not None:
                kept_outputs[rows] = output

        ctx.counts, ctx.activation = counts, activation
        ctx.save_for_backward(
            weights_TK, order_R, kept_gate_up, kept_outputs, gate_up_blocks, gate_up_scales, down_blocks, down_scales
        )
        return summed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights_TK, order_R, kept_gate_up, kept_outputs, *gate_up_packed, down_blocks, down_scales = ctx.saved_tensors
        gate_up_blocks, gate_up_scales = gate_up_packed
        gate_up_weight = _DecodedExpert(gate_up_blocks, gate_up_scales, grad_TD.dtype)
        down_weight = _DecodedExpert(down_blocks, down_scales, grad_TD.dtype)
        tokens_R = order_R // weights_TK.shape[1]
        weights_R = weights_TK.reshape(-1)[order_R]
        grad_hidden_TD = torch.zeros_like(grad_TD) if ctx.needs_input_grad[0] else None
        grad_weights_R = torch.zeros_like(weights_R) if kept_outputs is not None else None

        # Last expert first, as autograd would go through the dense loop: the sums round the same way.
        for expert, rows in reversed(list(_rows_by_expert(ctx.counts))):
            tokens = tokens_R[rows]
            grad_RD = grad_TD[tokens]
            if grad_weights_R is not None:
                grad_weights_R[rows] = (grad_RD * kept_outputs[rows]).sum(dim=-1).to(grad_weights_R.dtype)
            if grad_hidden_TD is None:
                continue
            grad_activated = (grad_RD * weights_R[rows, None]).to(grad_TD.dtype) @ down_weight(expert)
            gate_up = kept_gate_up[rows]
            gate = gate_up[:, 0::2].contiguous().requires_grad_()
            up = gate_up[:, 1::2].contiguous().requires_grad_()
            with torch.enable_grad():
                activated = ctx.activation(gate, up)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate_up[:, 0::2], grad_gate_up[:, 1::2] = torch.autograd.grad(activated, (gate, up), grad_activated)
            grad_hidden_TD.index_add_(0, tokens, grad_gate_up @ gate_up_weight(expert))

        grad_weights_TK = None
        if grad_weights_R is not None:
            grad_weights_TK = torch.empty_like(grad_weights_R).index_copy_(0, order_R, grad_weights_R)
            grad_weights_TK = grad_weights_TK.view(weights_TK.shape)
        return grad_hidden_TD, grad_weights_TK, *(None,) * 9


class _DecodedExpert:
    """One expert's matrix at a time, in a buffer allocated once: a new 30 MB block costs as much as decoding."""

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype):
        self._blocks, self._scales, self._dtype = blocks, scales, dtype
        # float32 holds every MXFP4 number, so other types (float64 in gradient checks) are rounded only once from it.
        self._decoded = dtype if dtype in PAIR_TYPES else torch.float32
        self._buffer: torch.Tensor | None = None

    def __call__(self, expert: int) -> torch.Tensor:
        blocks, scales = self._blocks[expert], self._scales[expert]
        self._buffer = decode(blocks, scales, self._decoded, out=self._buffer)
        return self._buffer.to(self._dtype)


def _sort_by_expert(indices_TK: torch.Tensor, experts: int) -> tuple[list[int], torch.Tensor]:
    """How many rows each expert has, and the row order: positions in the flattened (T, K), by expert, then token."""
    flat = indices_TK.reshape(-1)
    counts = torch.bincount(flat, minlength=experts).tolist()
    if len(counts) > experts:
        raise ShapeError(f"packed experts: a token is routed to expert {len(counts) - 1} of experts 0-{experts - 1}")
    return counts, torch.argsort(flat, stable=True)


def _rows_by_expert(counts: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _frozen_bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
