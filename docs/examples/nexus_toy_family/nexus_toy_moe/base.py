"""The toy family's model, as somebody published it: a small mixture of experts with habits of its own.

The first layer is dense. A router scores every expert by itself (a sigmoid), takes the best K, and leaves their weights
as they are, so they do not sum to 1. All experts of a layer lie stacked in three tensors, and their activation is GELU.

    # B sequences, S tokens each, T = B * S, D hidden size, E experts, K experts per token, F expert width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ToyMoeConfig(PreTrainedConfig):
    model_type = "toy_moe"
    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    dense_layers: int = 1
    dense_width: int = 128
    specialists: int = 8
    specialists_per_token: int = 2
    specialist_width: int = 32
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False


def route(logits_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights (T, K) in float32, each between 0 and 1, and expert indices (T, K)."""
    return torch.topk(logits_TE.float().sigmoid(), experts_per_token)


def gelu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What an expert's neurons put out."""
    return functional.gelu(gate, approximate="tanh") * up


class ToySwitch(nn.Module):
    """The router: gate weights (T, K), expert indices (T, K) and logits (T, E), in this order."""

    def __init__(self, config: ToyMoeConfig):
        super().__init__()
        self.experts_per_token = config.specialists_per_token
        self.weight = nn.Parameter(torch.empty(config.specialists, config.hidden_size))

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = functional.linear(hidden_TD, self.weight)
        weights_TK, indices_TK = route(logits_TE, self.experts_per_token)
        return weights_TK.to(hidden_TD.dtype), indices_TK, logits_TE


class ToyMixture(nn.Module):
    """The block with experts: (B, S, D) to (B, S, D)."""

    def __init__(self, config: ToyMoeConfig):
        super().__init__()
        E, D, F = config.specialists, config.hidden_size, config.specialist_width
        self.switch = ToySwitch(config)
        self.gates = nn.Parameter(torch.empty(E, F, D))
        self.ups = nn.Parameter(torch.empty(E, F, D))
        self.downs = nn.Parameter(torch.empty(E, D, F))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TK, indices_TK, _ = self.switch(hidden_TD)
        output_TD = torch.zeros_like(hidden_TD)
        for index in range(len(self.gates)):
            tokens, places = torch.where(indices_TK == index)
            chosen = hidden_TD[tokens]
            neurons = gelu_gate(chosen @ self.gates[index].T, chosen @ self.ups[index].T)
            output_TD.index_add_(0, tokens, (neurons @ self.downs[index].T) * weights_TK[tokens, places, None])
        return output_TD.view(hidden_states.shape)


class ToyDense(nn.Module):
    """The block of a layer without experts."""

    def __init__(self, config: ToyMoeConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.dense_width, bias=False)
        self.down = nn.Linear(config.dense_width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(hidden_states)))


class ToyAttention(nn.Module):
    def __init__(self, config: ToyMoeConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.mix = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(hidden_BSD).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class ToyLayer(GradientCheckpointingLayer):
    def __init__(self, config: ToyMoeConfig, number: int):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.hidden_size)
        self.attention = ToyAttention(config)
        self.norm_2 = nn.RMSNorm(config.hidden_size)
        self.feed = ToyDense(config) if number < config.dense_layers else ToyMixture(config)

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        hidden_BSD = hidden_BSD + self.attention(self.norm_1(hidden_BSD))
        return hidden_BSD + self.feed(self.norm_2(hidden_BSD))


class ToyMoePreTrainedModel(PreTrainedModel):
    config_class = ToyMoeConfig
    base_model_prefix = "toy"
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ToySwitch | ToyMixture):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class ToyMoeModel(ToyMoePreTrainedModel):
    def __init__(self, config: ToyMoeConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList([ToyLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        """Without a cache: every call reads the whole text."""
        hidden_BSD = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            hidden_BSD = block(hidden_BSD)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BSD))


class ToyMoeForCausalLM(ToyMoePreTrainedModel, GenerationMixin):
    def __init__(self, config: ToyMoeConfig):
        super().__init__(config)
        self.toy = ToyMoeModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.head(self.toy(input_ids).last_hidden_state))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}
