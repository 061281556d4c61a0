"""The families, a few lines each; every hook is `nexus_core.families.TransformersFamilies`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

families = TransformersFamilies(qwen3_moe, qwen2_moe, olmoe, mixtral, granitemoe, glm4_moe, dots1)
