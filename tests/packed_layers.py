"""A layer of random packed experts, and the same numbers in transformers' dense module."""

from __future__ import annotations

import torch
from gpt_oss_checkpoints import published_config, random_tensors
from nexus_gpt_oss.experts import PackedExperts
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

ALPHA, LIMIT = 1.702, 7.0
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed_experts(*, experts: int = 6, hidden: int = 64, width: int = 32) -> PackedExperts:
    config = published_config(layers=1, experts=experts, hidden=hidden, width=width, vocab_size=8)
    prefix = "model.layers.0.mlp.experts."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in random_tensors(config, seed=5).items()
        if name.startswith(prefix)
    }
    module = PackedExperts(experts=experts, hidden_size=hidden, width=width, alpha=ALPHA, limit=LIMIT)
    module.load_state_dict(tensors)
    return module


def dense_matrix(module: PackedExperts, name: str) -> torch.Tensor:
    """All experts of one projection in float32, (E, rows, columns), rows as stored."""
    blocks, scales = getattr(module, f"{name}_blocks"), getattr(module, f"{name}_scales")
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    return (FP4[nibbles.long()] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)


def dense_experts(module: PackedExperts, dtype: torch.dtype) -> GptOssExperts:
    """transformers' own module with the same numbers."""
    config = GptOssConfig(
        hidden_size=module.hidden_size,
        intermediate_size=module.width,
        num_local_experts=module.expert_count,
        experts_implementation="eager",
    )
    dense = GptOssExperts(config)
    numbers = {}
    for name in ("gate_up_proj", "down_proj"):
        numbers[name] = dense_matrix(module, name).transpose(1, 2).contiguous()
        numbers[f"{name}_bias"] = getattr(module, f"{name}_bias")
    dense.load_state_dict(numbers)
    return dense.to(dtype)


def routed_inputs(
    module: PackedExperts, tokens: int, top_k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, indices and gate weights; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_TD = torch.randn((tokens, module.hidden_size), generator=generator).to(dtype).requires_grad_()
    scores_TE = torch.randn((tokens, module.expert_count), generator=generator)
    scores_TE[:, -1] = -torch.inf
    chosen_TK, indices_TK = scores_TE.topk(top_k)
    return hidden_TD, indices_TK, chosen_TK.softmax(dim=-1).to(dtype).requires_grad_()


def answers(
    module: torch.nn.Module, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Output, and gradients of hidden states and gate weights for a fixed random cotangent."""
    output_TD = module(hidden_TD, indices_TK, weights_TK)
    cotangent_TD = torch.randn(output_TD.shape, generator=torch.Generator().manual_seed(1)).to(output_TD)
    return output_TD, *torch.autograd.grad(output_TD, (hidden_TD, weights_TK), cotangent_TD)
