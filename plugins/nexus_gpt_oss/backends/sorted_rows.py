"""All experts' rows at once, sorted by expert: what the backends share that differ only in how they multiply.

Each token's rows are gathered by its own K places and added in that order, so sums are the same in every run; adding
rows to tokens by index would on a GPU add them in whatever order threads come.

# T tokens, K experts per token, R = T * K rows sorted by expert, D hidden size, F twice the expert width
"""

from __future__ import annotations

from typing import Protocol

import torch

from nexus_gpt_oss.backends.activation import activate, activation_gradient
from nexus_gpt_oss.backends.rows import Experts, Forward, Keeps, PackedMatrix, Routing


class Products(Protocol):
    """Multiplies each row with its expert's packed matrix (O, I)."""

    name: str

    def outputs(self, matrix: PackedMatrix, routing: Routing, rows_RI: torch.Tensor) -> torch.Tensor:
        """Rows times the transposed matrix plus the bias, (R, O)."""

    def inputs(self, matrix: PackedMatrix, routing: Routing, grad_RO: torch.Tensor) -> torch.Tensor:
        """Rows times the matrix, (R, I): the gradient of `outputs`' rows."""


class SortedBackend:
    """See `ExpertsBackend`. At no time are more weights dense than `products` holds."""

    def __init__(self, products: Products):
        self.name = products.name
        self._products = products

    def forward(
        self, experts: Experts, routing: Routing, hidden_TD: torch.Tensor, weights_TK: torch.Tensor, keeps: Keeps
    ) -> Forward:
        gate_up_RF = self._products.outputs(experts.gate_up, routing, hidden_TD[routing.tokens_R])
        activated = activate(experts.activation, gate_up_RF)
        if not keeps.gate_up:
            del gate_up_RF
        outputs_RD = self._products.outputs(experts.down, routing, activated)
        summed_TD = _sum_by_token(routing, outputs_RD, weights_TK)
        return Forward(summed_TD, gate_up_RF if keeps.gate_up else None, outputs_RD if keeps.outputs else None)

    def backward(
        self,
        experts: Experts,
        routing: Routing,
        grad_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up_RF: torch.Tensor,
    ) -> torch.Tensor:
        weights_R = weights_TK.reshape(-1)[routing.order_R]
        grad_RD = (grad_TD[routing.tokens_R] * weights_R[:, None]).to(grad_TD.dtype)
        grad_activated = self._products.inputs(experts.down, routing, grad_RD)
        del grad_RD
        grad_gate_up_RF = activation_gradient(experts.activation, gate_up_RF, grad_activated)
        del grad_activated
        return _sum_by_token(routing, self._products.inputs(experts.gate_up, routing, grad_gate_up_RF), None)


def _sum_by_token(routing: Routing, rows_RD: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """Each token's rows, weighted, added in float32 or better; (T, D), rounded once."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    summed_TD = torch.zeros((len(routing.rows_TK), rows_RD.shape[1]), dtype=wide, device=rows_RD.device)
    for place in range(routing.experts_per_token):
        rows_TD = rows_RD[routing.rows_TK[:, place]]
        if weights_TK is None:
            summed_TD.add_(rows_TD)
        else:
            summed_TD.addcmul_(rows_TD.to(wide), weights_TK[:, place, None].to(wide))
    return summed_TD.to(rows_RD.dtype)
