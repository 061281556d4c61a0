"""One expert after the other, in plain torch: the least memory, and equal to the bit to transformers' dense loop.

# T tokens, K experts per token, R rows sorted by expert, D hidden size, F twice the expert width
"""

from __future__ import annotations

import torch

from nexus_gpt_oss.backends.activation import activate, activation_gradient
from nexus_gpt_oss.backends.rows import (
    Experts,
    Forward,
    Gradients,
    Kept,
    Needs,
    PackedMatrix,
    Routing,
    gate_weight_gradient,
)
from nexus_gpt_oss.backends.workspace import workspace
from nexus_gpt_oss.decoding.format import PAIR_TYPES
from nexus_gpt_oss.mxfp4 import decode


class LoopBackend:
    """See `ExpertsBackend`. No more than one matrix of one expert is dense at any time."""

    name = "loop"

    def forward(
        self, experts: Experts, routing: Routing, hidden_TD: torch.Tensor, weights_TK: torch.Tensor, needs: Needs
    ) -> Forward:
        dtype, rows_in_all = hidden_TD.dtype, len(routing.order_R)
        weights_R = weights_TK.reshape(-1)[routing.order_R]
        gate_up_RF = hidden_TD.new_empty((rows_in_all, experts.gate_up.outputs)) if needs.hidden else None
        outputs_RD = hidden_TD.new_empty((rows_in_all, experts.down.outputs)) if needs.weights else None
        summed_TD = torch.zeros_like(hidden_TD)
        for expert, rows in routing.by_expert():
            tokens = routing.tokens_R[rows]
            place = None if gate_up_RF is None else gate_up_RF[rows]
            # In two steps, as transformers does: a fused bias would be rounded differently.
            gate_up = torch.mm(hidden_TD[tokens], _decoded(experts.gate_up, expert, dtype).T, out=place)
            activated = activate(experts.activation, gate_up.add_(experts.gate_up.bias_of(expert, dtype)))
            place = None if outputs_RD is None else outputs_RD[rows]
            output = torch.mm(activated, _decoded(experts.down, expert, dtype).T, out=place)
            output.add_(experts.down.bias_of(expert, dtype))
            summed_TD.index_add_(0, tokens, (output * weights_R[rows, None]).to(dtype))
        return Forward(summed_TD, Kept(gate_up_RF, outputs_RD))

    def backward(
        self,
        experts: Experts,
        routing: Routing,
        grad_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        kept: Kept,
        needs: Needs,
    ) -> Gradients:
        grad_hidden_TD = grad_weights_TK = None
        if kept.outputs_RD is not None and needs.weights:
            grad_weights_TK = gate_weight_gradient(routing, grad_TD, kept.outputs_RD).to(weights_TK.dtype)
        if kept.gate_up_RF is not None and needs.hidden:
            grad_hidden_TD = self._hidden_gradient(experts, routing, grad_TD, weights_TK, kept.gate_up_RF)
        return Gradients(grad_hidden_TD, grad_weights_TK)

    def _hidden_gradient(
        self,
        experts: Experts,
        routing: Routing,
        grad_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up_RF: torch.Tensor,
    ) -> torch.Tensor:
        dtype = grad_TD.dtype
        weights_R = weights_TK.reshape(-1)[routing.order_R]
        grad_hidden_TD = torch.zeros_like(grad_TD)
        # Last expert first, as autograd would go through the dense loop: the sums round the same way.
        for expert, rows in reversed(list(routing.by_expert())):
            tokens = routing.tokens_R[rows]
            grad_output = (grad_TD[tokens] * weights_R[rows, None]).to(dtype)
            grad_activated = grad_output @ _decoded(experts.down, expert, dtype)
            grad_gate_up = activation_gradient(experts.activation, gate_up_RF[rows], grad_activated)
            grad_hidden_TD.index_add_(0, tokens, grad_gate_up @ _decoded(experts.gate_up, expert, dtype))
        return grad_hidden_TD


def _decoded(matrix: PackedMatrix, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix (O, I), until the next is asked for."""
    # float32 holds every MXFP4 number, so other types (float64 in gradient checks) are rounded only once from it.
    decoded = dtype if dtype in PAIR_TYPES else torch.float32
    out = workspace((matrix.outputs, matrix.inputs), decoded, matrix.blocks.device)
    return decode(matrix.blocks[expert], matrix.scales[expert], decoded, out=out).to(dtype)
