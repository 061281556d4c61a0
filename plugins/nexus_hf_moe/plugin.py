"""The families, a few lines each; every hook is `nexus_core.families.TransformersFamilies`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nexus_core.families import (
    Fused,
    Layout,
    PerExpert,
    TransformersFamilies,
    after_dense_layers,
    every_layer,
    group_limited_sigmoid,
    softmax_of_top_k,
    sums_to_one_if_unscaled,
    top_k_of_softmax,
)
from nexus_core.families.rules import ADDED_SELECTION_BIAS, RouterTensors, required

if TYPE_CHECKING:
    import torch


def by_norm_topk_prob(config: Mapping[str, Any]) -> bool:
    """Whether the config has the K weights divided by their sum; transformers' default is no."""
    return bool(config.get("norm_topk_prob", False))


def always(config: Mapping[str, Any]) -> bool:
    return True


def sparse_layers(config: Mapping[str, Any]) -> list[int]:
    """Every `decoder_sparse_step`-th layer, without those that `mlp_only_layers` names."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return [layer for layer in every_layer(config) if (layer + 1) % step == 0 and layer not in dense]


qwen3_moe = Layout(
    model_type="qwen3_moe",
    gate_weights=top_k_of_softmax(weights_sum_to_one=by_norm_topk_prob),
    weights_sum_to_one=by_norm_topk_prob,
    layers=sparse_layers,
)

# Its own shared expert, behind a sigmoid gate, stays as it is; NEXUS's is added beside it.
qwen2_moe = Layout(
    model_type="qwen2_moe",
    gate_weights=top_k_of_softmax(weights_sum_to_one=by_norm_topk_prob),
    weights_sum_to_one=by_norm_topk_prob,
    layers=sparse_layers,
)

olmoe = Layout(
    model_type="olmoe",
    gate_weights=top_k_of_softmax(weights_sum_to_one=by_norm_topk_prob),
    weights_sum_to_one=by_norm_topk_prob,
    expert_width="intermediate_size",
)

mixtral = Layout(
    model_type="mixtral",
    gate_weights=top_k_of_softmax(weights_sum_to_one=always),
    weights_sum_to_one=always,
    stored_experts=PerExpert(
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    ),
    stored_router="block_sparse_moe.gate.weight",
    expert_width="intermediate_size",
)

granitemoe = Layout(
    model_type="granitemoe",
    gate_weights=softmax_of_top_k,
    weights_sum_to_one=always,
    block="block_sparse_moe",
    router="router",
    stored_experts=Fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    stored_router="block_sparse_moe.router.layer.weight",
    expert_width="intermediate_size",
)

# Sigmoid scores with a selection bias; shared experts of their own stay as they are.
glm4_moe = Layout(
    model_type="glm4_moe",
    gate_weights=group_limited_sigmoid,
    weights_sum_to_one=sums_to_one_if_unscaled,
    experts=("n_routed_experts", "num_local_experts"),
    layers=after_dense_layers,
)

dots1 = Layout(
    model_type="dots1",
    gate_weights=group_limited_sigmoid,
    weights_sum_to_one=sums_to_one_if_unscaled,
    experts=("n_routed_experts", "num_local_experts"),
    layers=after_dense_layers,
)


ERNIE_SELECTION_BIAS = "moe_statics.e_score_correction_bias"


def top_k_of_biased_softmax(
    config: Mapping[str, Any], logits_TE: torch.Tensor, router: RouterTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts chosen by softmax plus the router's selection bias, weighted by the softmax alone, divided by its sum."""
    probabilities_TE = logits_TE.float().softmax(dim=-1)
    preferred_TE = probabilities_TE + router[ERNIE_SELECTION_BIAS].squeeze()
    if ADDED_SELECTION_BIAS in router:
        preferred_TE = preferred_TE + router[ADDED_SELECTION_BIAS]
    indices_TK = preferred_TE.topk(config["num_experts_per_tok"], dim=-1).indices
    weights_TK = probabilities_TE.gather(-1, indices_TK)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=required(config, "moe_norm_min")), indices_TK


def ernie_sparse_layers(config: Mapping[str, Any]) -> list[int]:
    """Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`, -1 for the last."""
    first, last = required(config, "moe_layer_start_index"), required(config, "moe_layer_end_index")
    inside = every_layer(config)[first : None if last == -1 else last + 1]
    return [layer for layer in inside if (layer + 1) % required(config, "moe_layer_interval") == 0]


ernie4_5_moe = Layout(
    model_type="ernie4_5_moe",
    gate_weights=top_k_of_biased_softmax,
    weights_sum_to_one=always,
    stored_names={f"mlp.gate.{ERNIE_SELECTION_BIAS}": f"mlp.{ERNIE_SELECTION_BIAS}"},
    experts="moe_num_experts",
    experts_per_token="moe_k",
    layers=ernie_sparse_layers,
)

families = TransformersFamilies(qwen3_moe, qwen2_moe, olmoe, mixtral, granitemoe, glm4_moe, dots1, ernie4_5_moe)
