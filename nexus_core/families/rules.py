"""Routing rules that several families have in common: logits to gate weights and indices.

A rule is called with the config, logits (T, E), and the router's own tensors by name, for families whose choice of
experts depends on more than the logits. It computes in float32, as transformers does; whether the model rounds the
weights afterwards is its own business.

    # T tokens, E experts, K experts per token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

Config: TypeAlias = Mapping[str, Any]
RouterTensors: TypeAlias = "Mapping[str, torch.Tensor]"
Rule: TypeAlias = "Callable[[Config, torch.Tensor, RouterTensors], tuple[torch.Tensor, torch.Tensor]]"


def top_k_of_softmax(*, weights_sum_to_one: Callable[[Config], bool]) -> Rule:
    """The K largest of the softmax over all experts, divided by their sum where `weights_sum_to_one` says so."""

    def rule(config: Config, logits_TE: torch.Tensor, router: RouterTensors) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
        weights_TK, indices_TK = torch.topk(probabilities_TE, config["num_experts_per_tok"], dim=-1)
        if weights_sum_to_one(config):
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, indices_TK

    return rule


def softmax_of_top_k(
    config: Config, logits_TE: torch.Tensor, router: RouterTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over each token's K largest logits only; weights sum to 1."""
    import torch

    chosen_TK, indices_TK = torch.topk(logits_TE.float(), config["num_experts_per_tok"], dim=-1)
    return torch.softmax(chosen_TK, dim=-1), indices_TK
