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
    parts = [
        activation(gate_up_RF[rows, 0::2].contiguous(), gate_up_RF[rows, 1::2].contiguous())
        for rows in pieces(len(gate_up_RF))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def activation_gradient(activation: Activation, gate_up_RF: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of gate_up, (R, F), for the gradient (R, F / 2) of what `activate` gives."""
    grad_gate_up = torch.empty_like(gate_up_RF)
    for rows in pieces(len(gate_up_RF)):
        gate = gate_up_RF[rows, 0::2].contiguous().requires_grad_()
        up = gate_up_RF[rows, 1::2].contiguous().requires_grad_()
        with torch.enable_grad():
            activated = activation(gate, up)
        grad_gate_up[rows, 0::2], grad_gate_up[rows, 1::2] = torch.autograd.grad(activated, (gate, up), grad[rows])
    return grad_gate_up
