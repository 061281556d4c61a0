"""Routing rules that several families have in common: logits to gate weights and indices.

A rule is called with the config, in which K is `num_experts_per_tok` whatever the family calls it, logits (T, E), and
the router's own tensors by name, for families whose choice of experts depends on more than the logits. It computes in
float32, as transformers does; whether the model rounds the weights afterwards is its own business.

    # T tokens, E experts, G groups of experts, K experts per token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from nexus_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Config: TypeAlias = Mapping[str, Any]
RouterTensors: TypeAlias = "Mapping[str, torch.Tensor]"
Rule: TypeAlias = "Callable[[Config, torch.Tensor, RouterTensors], tuple[torch.Tensor, torch.Tensor]]"

# What transformers calls a router's selection bias (E,), which no gradient trains.
SELECTION_BIAS = "e_score_correction_bias"

# What `nexus_core.additions.RouterDelta` adds to it, or to the logits of a router that has none: under a name that no
# router's own tensor has.
ADDED_SELECTION_BIAS = "nexus_selection_bias"


def top_k_of_softmax(*, weights_sum_to_one: Callable[[Config], bool]) -> Rule:
    """The K largest of the softmax over all experts, divided by their sum where `weights_sum_to_one` says so."""

    def rule(config: Config, logits_TE: torch.Tensor, router: RouterTensors) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
        if ADDED_SELECTION_BIAS in router:
            indices_TK = torch.topk(
                logits_TE.float() + router[ADDED_SELECTION_BIAS], config["num_experts_per_tok"], dim=-1
            ).indices
            weights_TK = probabilities_TE.gather(-1, indices_TK)
        else:
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

    logits_TE = logits_TE.float()
    preferred_TE = logits_TE + router[ADDED_SELECTION_BIAS] if ADDED_SELECTION_BIAS in router else logits_TE
    indices_TK = torch.topk(preferred_TE, config["num_experts_per_tok"], dim=-1).indices
    return torch.softmax(logits_TE.gather(-1, indices_TK), dim=-1), indices_TK


def group_limited_sigmoid(
    config: Config, logits_TE: torch.Tensor, router: RouterTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts chosen by sigmoid score plus the router's selection bias, weighted by the score alone.

    Only the `topk_group` groups whose two best experts score highest are eligible. Weights are divided by their sum if
    `norm_topk_prob` says so, then multiplied by `routed_scaling_factor`. Source: arXiv 2412.19437, section 2.1.2; the
    order of operations is transformers'.
    """
    import torch

    scores_TE = logits_TE.float().sigmoid()
    preferred_TE = scores_TE + router[SELECTION_BIAS].float()
    if ADDED_SELECTION_BIAS in router:
        preferred_TE = preferred_TE + router[ADDED_SELECTION_BIAS]
    grouped_TGE = preferred_TE.unflatten(-1, (required(config, "n_group"), -1))
    group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(dim=-1)
    eligible = torch.topk(group_scores_TG, required(config, "topk_group"), dim=-1, sorted=False).indices
    is_eligible_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, eligible, True)
    preferred_TE = grouped_TGE.masked_fill(~is_eligible_TG[..., None], float("-inf")).flatten(-2)
    indices_TK = torch.topk(preferred_TE, config["num_experts_per_tok"], dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, indices_TK)
    if required(config, "norm_topk_prob"):
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * required(config, "routed_scaling_factor"), indices_TK


def sums_to_one_if_unscaled(config: Config) -> bool:
    """Whether weights are divided by their sum and not scaled afterwards."""
    return bool(required(config, "norm_topk_prob")) and required(config, "routed_scaling_factor") == 1


def required(config: Config, name: str) -> Any:
    """A setting that has no default worth guessing. Raises CheckpointError if the config lacks it."""
    if config.get(name) is None:
        raise CheckpointError(f"config.json: {name} is missing, so how the router chooses is unknown")
    return config[name]
