"""A small mixture-of-experts model, standing in for yours: delete this file once `modeling.py` imports your own.

What NEXUS asks of a model: it is a causal language model of transformers, `model.base_model` is the decoder without its
output head, and in every layer with experts both the block and the router in it are modules that are called.

    # B sequences, S tokens each, T = B * S, D hidden size, E experts, K experts per token, F expert width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MyMoeConfig(PreTrainedConfig):
    model_type = "my_moe"
    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False


def route(logits_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights (T, K) in float32, which sum to 1, and expert indices (T, K): the top of the softmax, rescaled."""
    weights_TK, indices_TK = torch.topk(logits_TE.float().softmax(-1), experts_per_token)
    return weights_TK / weights_TK.sum(-1, keepdim=True), indices_TK


class MyMoeRouter(nn.Module):
    """Logits (T, E), gate weights (T, K) and expert indices (T, K) for hidden states (T, D)."""

    def __init__(self, config: MyMoeConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = functional.linear(hidden_TD, self.weight)
        weights_TK, indices_TK = route(logits_TE, self.experts_per_token)
        return logits_TE, weights_TK.to(hidden_TD.dtype), indices_TK


class MyMoeExpert(nn.Module):
    def __init__(self, config: MyMoeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)
        self.activate = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activate(self.gate_proj(hidden)) * self.up_proj(hidden))


class MyMoeBlock(nn.Module):
    """Each token's K experts, weighted: (B, S, D) to (B, S, D)."""

    def __init__(self, config: MyMoeConfig):
        super().__init__()
        self.gate = MyMoeRouter(config)
        self.experts = nn.ModuleList([MyMoeExpert(config) for _ in range(config.num_experts)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        output_TD = torch.zeros_like(hidden_TD)
        for index, expert in enumerate(self.experts):
            tokens, places = torch.where(indices_TK == index)
            output_TD.index_add_(0, tokens, expert(hidden_TD[tokens]) * weights_TK[tokens, places, None])
        return output_TD.view(hidden_states.shape)


class MyMoeAttention(nn.Module):
    def __init__(self, config: MyMoeConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(hidden_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MyMoeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MyMoeConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.self_attn = MyMoeAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)
        self.mlp = MyMoeBlock(config)

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        hidden_BSD = hidden_BSD + self.self_attn(self.input_layernorm(hidden_BSD))
        return hidden_BSD + self.mlp(self.post_attention_layernorm(hidden_BSD))


class MyMoePreTrainedModel(PreTrainedModel):
    config_class = MyMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MyMoeRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class MyMoeModel(MyMoePreTrainedModel):
    def __init__(self, config: MyMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([MyMoeDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        """Without a cache: every call reads the whole text."""
        positions_S = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_BSD = self.embed_tokens(input_ids) + self.embed_positions(positions_S)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BSD))


class MyMoeForCausalLM(MyMoePreTrainedModel, GenerationMixin):
    def __init__(self, config: MyMoeConfig):
        super().__init__(config)
        self.model = MyMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}
