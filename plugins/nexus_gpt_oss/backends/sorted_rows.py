"""All experts' rows at once, sorted by expert: what the backends share that differ only in how they multiply.

Rows go through in slices of whole experts, so that what lies between the two products exists for one slice at a time.
Whole exist only gate_up, which the way back needs, and the rows that are added by token at the end: each token's by its
own K places, in that order, so sums are the same in every run; adding rows to tokens by index would on a GPU add them
in whatever order threads come.

Beside tensors of T tokens these are R * F numbers kept and R * D at work; of a slice at most S * (D + F) on the way
forward and S * 3/2 F back, and with them either the decoded experts or the intermediate results of an activation.

# T tokens, K experts per token, R = T * K rows sorted by expert, S rows of a slice
# D hidden size, F twice the expert width
"""

from __future__ import annotations

from typing import Protocol

import torch

from nexus_gpt_oss.backends.activation import activate, weighted_activation_gradients
from nexus_gpt_oss.backends.rows import (
    Experts,
    Forward,
    Gradients,
    Kept,
    Needs,
    PackedMatrix,
    Routing,
    SortedRows,
    pieces,
)

# Rows between the two products at a time, unless a single expert has more: 32 experts of 256 rows, which is enough for
# several groups of decoded ones, and 94 MB of gate_up at gpt-oss's widths.
SLICE_ROWS = 8192


class Products(Protocol):
    """Multiplies each row with its expert's packed matrix (O, I), and writes the products to `out`."""

    name: str

    def outputs(self, matrix: PackedMatrix, rows: SortedRows, rows_RI: torch.Tensor, out: torch.Tensor) -> None:
        """Rows times the transposed matrix plus the bias, (R, O)."""

    def inputs(self, matrix: PackedMatrix, rows: SortedRows, grad_RO: torch.Tensor, out: torch.Tensor) -> None:
        """Rows times the matrix, (R, I): the gradient of `outputs`' rows."""


class SortedBackend:
    """See `ExpertsBackend`. At no time are more weights dense than `products` holds."""

    def __init__(self, products: Products):
        self.name = products.name
        self._products = products

    def forward(
        self, experts: Experts, routing: Routing, hidden_TD: torch.Tensor, weights_TK: torch.Tensor, needs: Needs
    ) -> Forward:
        outputs_RD = hidden_TD.new_empty((len(routing.order_R), experts.down.outputs))
        gate_up_RF = None
        if needs.hidden or needs.weights:
            gate_up_RF = hidden_TD.new_empty((len(routing.order_R), experts.gate_up.outputs))
        for rows, part in routing.slices(SLICE_ROWS):
            place = None if gate_up_RF is None else gate_up_RF[rows]
            activated = self._activated(experts, part, hidden_TD, place)
            self._products.outputs(experts.down, part, activated, outputs_RD[rows])
            # Or it would be there still while the next slice's is made.
            del activated
        return Forward(_sum_by_token(routing, outputs_RD, weights_TK), Kept(gate_up_RF))

    def _activated(
        self, experts: Experts, rows: SortedRows, hidden_TD: torch.Tensor, gate_up_SF: torch.Tensor | None
    ) -> torch.Tensor:
        """A slice's activations. gate_up_SF: where its first products are to be kept, if they are."""
        if gate_up_SF is None:
            gate_up_SF = hidden_TD.new_empty((len(rows.order_R), experts.gate_up.outputs))
        self._products.outputs(experts.gate_up, rows, hidden_TD[rows.tokens_R], gate_up_SF)
        return activate(experts.activation, gate_up_SF)

    def backward(
        self,
        experts: Experts,
        routing: Routing,
        grad_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        kept: Kept,
        needs: Needs,
    ) -> Gradients:
        gate_up_RF = kept.gate_up_RF
        assert gate_up_RF is not None
        wide = torch.promote_types(grad_TD.dtype, torch.float32)
        grad_RD = grad_TD.new_empty((len(gate_up_RF), experts.gate_up.inputs)) if needs.hidden else None
        grad_weights_R = grad_TD.new_empty(len(gate_up_RF), dtype=wide)
        for rows, part in routing.slices(SLICE_ROWS):
            weights_S = weights_TK.reshape(-1)[part.order_R]
            grad_gate_up, grad_weights_R[rows] = self._gradients(experts, part, grad_TD, weights_S, gate_up_RF[rows])
            if grad_RD is not None:
                self._products.inputs(experts.gate_up, part, grad_gate_up, grad_RD[rows])
            del grad_gate_up
        return Gradients(
            None if grad_RD is None else _sum_by_token(routing, grad_RD, None),
            _gate_weight_gradient(experts, routing, grad_TD, grad_weights_R).to(weights_TK.dtype)
            if needs.weights
            else None,
        )

    def _gradients(
        self,
        experts: Experts,
        rows: SortedRows,
        grad_TD: torch.Tensor,
        weights_S: torch.Tensor,
        gate_up_SF: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A slice's gradients of gate_up (S, F), and of the gate weights (S,), of these without the biases' share."""
        grad_activated = grad_TD.new_empty((len(weights_S), experts.down.inputs))
        self._products.inputs(experts.down, rows, grad_TD[rows.tokens_R], grad_activated)
        return weighted_activation_gradients(experts.activation, gate_up_SF, weights_S, grad_activated)


def _gate_weight_gradient(
    experts: Experts, routing: Routing, grad_TD: torch.Tensor, without_bias_R: torch.Tensor
) -> torch.Tensor:
    """(T, K), in float32 or better.

    A token's output is the sum of weight * (down @ activated + bias), so a weight's gradient is that of without_bias_R,
    grad @ down @ activated, and grad @ bias. Taken so, outputs need not be kept for it.
    """
    through_biases_TE = grad_TD @ experts.down.bias.to(grad_TD.dtype).T
    experts_TK = routing.experts_R[routing.rows_TK]
    return without_bias_R[routing.rows_TK] + through_biases_TE.gather(1, experts_TK)


def _sum_by_token(routing: Routing, rows_RD: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """Each token's rows, weighted, added in float32 or better; (T, D), rounded once."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    summed_TD = rows_RD.new_empty((len(routing.rows_TK), rows_RD.shape[1]))
    for tokens in pieces(len(summed_TD)):
        rows_TK = routing.rows_TK[tokens]
        sums = torch.zeros((len(rows_TK), rows_RD.shape[1]), dtype=wide, device=rows_RD.device)
        for place in range(routing.experts_per_token):
            if weights_TK is None:
                sums.add_(rows_RD[rows_TK[:, place]])
            else:
                sums.addcmul_(rows_RD[rows_TK[:, place]].to(wide), weights_TK[tokens, place, None].to(wide))
        summed_TD[tokens] = sums
    return summed_TD
