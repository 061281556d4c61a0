"""The activation between an expert's two products, on rows of gate_up as stored: gate 0, up 0, gate 1, up 1.

Number by number, so rows are taken a piece at a time: an activation's intermediate results, eight of them or so, would
for all rows of a large batch be gigabytes.

# R rows, F twice the expert width
"""

from __future__ import annotations

import torch

from nexus_core.additions import Activation
from nexus_gpt_oss.backends.rows import pieces


def activate(activation: Activation, gate_up_RF: torch.Tensor) -> torch.Tensor:
    """(R, F / 2) for gate_up (R, F)."""
    in_turn = pieces(len(gate_up_RF))
    if len(in_turn) == 1:
        return activation(gate_up_RF[:, 0::2].contiguous(), gate_up_RF[:, 1::2].contiguous())
    activated = gate_up_RF.new_empty((len(gate_up_RF), gate_up_RF.shape[1] // 2))
    for rows in in_turn:
        activated[rows] = activation(gate_up_RF[rows, 0::2].contiguous(), gate_up_RF[rows, 1::2].contiguous())
    return activated


def activation_gradient(activation: Activation, gate_up_RF: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of gate_up, (R, F), for the gradient (R, F / 2) of what `activate` gives."""
    grad_gate_up = torch.empty_like(gate_up_RF)
    for rows in pieces(len(gate_up_RF)):
        _go_back(activation, gate_up_RF[rows], grad[rows], grad_gate_up[rows])
    return grad_gate_up


def weighted_activation_gradients(
    activation: Activation, gate_up_RF: torch.Tensor, weights_R: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate_up, (R, F), and of weights, (R,) in float32 or better, for the gradient (R, F / 2) of what
    `activate` gives times the rows' weights.
    """
    grad_gate_up = torch.empty_like(gate_up_RF)
    grad_weights_R = grad.new_empty(len(grad), dtype=torch.promote_types(grad.dtype, torch.float32))
    for rows in pieces(len(gate_up_RF)):
        weighted = (grad[rows] * weights_R[rows, None]).to(grad.dtype)
        activated = _go_back(activation, gate_up_RF[rows], weighted, grad_gate_up[rows])
        torch.sum(activated.mul_(grad[rows]), dim=-1, dtype=grad_weights_R.dtype, out=grad_weights_R[rows])
    return grad_gate_up, grad_weights_R


def _go_back(activation: Activation, gate_up: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What a piece's activation gives; its gradient is written to out."""
    gate = gate_up[:, 0::2].contiguous().requires_grad_()
    up = gate_up[:, 1::2].contiguous().requires_grad_()
    with torch.enable_grad():
        activated = activation(gate, up)
    out[:, 0::2], out[:, 1::2] = torch.autograd.grad(activated, (gate, up), grad)
    return activated.detach()
