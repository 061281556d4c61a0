"""Ways to compute a layer's packed experts, one file each; `choice` picks one by device and says which.

    loop      one expert after the other, plain torch: CPUs, and what the others are checked against
    grouped   experts decoded a group at a time into a bounded buffer, grouped products: GPUs
    fused     decoded inside the product, never written: GPUs, with Triton, in bfloat16, where it is faster

NEXUS_GPT_OSS_EXPERTS=loop, grouped or fused forces one; NEXUS_GPT_OSS_DECODED_MB bounds grouped's buffer (256).
"""

from __future__ import annotations

from typing import Protocol

import torch

from nexus_gpt_oss.backends.rows import Experts, Forward, Gradients, Kept, Needs, Routing


class ExpertsBackend(Protocol):
    """Computes packed experts forward and backward; the packed bytes are read in both, and never held dense as a whole.

    # T tokens, K experts per token, R = T * K rows sorted by expert, D hidden size, F twice the expert width
    """

    name: str

    def forward(
        self, experts: Experts, routing: Routing, hidden_TD: torch.Tensor, weights_TK: torch.Tensor, needs: Needs
    ) -> Forward:
        """Each token's experts, weighted and summed, (T, D), of the hidden states' type, with what `needs` takes."""

    def backward(
        self,
        experts: Experts,
        routing: Routing,
        grad_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        kept: Kept,
        needs: Needs,
    ) -> Gradients:
        """Those that are needed, for the gradient (T, D) of what `forward` gave. kept: by `forward`, not changed."""
