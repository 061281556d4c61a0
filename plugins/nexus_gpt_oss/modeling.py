"""GPT-OSS with packed experts, and per layer, when the configuration says so, a shared expert and a router change.

Attention, norms, rotary embedding and the forward passes are transformers' own; only the mixture-of-experts block and
what holds it are built here, so that no dense expert is ever allocated.

    # B batch, S sequence length, T = B * S tokens, D hidden size, E experts, K experts per token
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssForCausalLM,
    GptOssModel,
    GptOssPreTrainedModel,
    GptOssRMSNorm,
)
from transformers.utils.output_capturing import OutputRecorder

from nexus_core.additions import RouterDelta, SharedExpert, refuse_unless_attachable
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.errors import CheckpointError
from nexus_core.families.strict import StrictlyLoaded, some
from nexus_gpt_oss.attention.layer import NexusGptOssAttention, visibilities
from nexus_gpt_oss.configuration import NexusGptOssConfig
from nexus_gpt_oss.experts import PackedExperts, swiglu
from nexus_gpt_oss.rotary import NexusRotaryEmbedding


class PackedRouter(nn.Module):
    """Logits (T, E), gate weights (T, K) that sum to 1, and expert indices (T, K) for hidden states (T, D)."""

    def __init__(self, config: NexusGptOssConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(config.num_local_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_local_experts))

    def forward(
        self,
        hidden_TD: torch.Tensor,
        delta_TE: torch.Tensor | None = None,
        selection_bias_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """delta_TE: a learned change of the logits; a change of zero gives the weights of none, to the bit.

        selection_bias_E: added to the changed logits where experts are chosen, not where they are weighted.
        """
        logits_TE = functional.linear(hidden_TD, self.weight, self.bias)
        if delta_TE is None:
            weights_TK, indices_TK = route(logits_TE, self.experts_per_token)
            return logits_TE, weights_TK, indices_TK
        changed_TE = logits_TE + delta_TE
        changed_TK, indices_TK = route(changed_TE, self.experts_per_token, selection_bias_E)
        # softmax rounds differently in bfloat16 and in the change's float32, so the base's own weights are moved by
        # the exact difference that the change makes, instead of being replaced.
        base_TK = logits_TE.gather(-1, indices_TK)
        moved_TK = changed_TK - functional.softmax(base_TK.to(changed_TK.dtype), dim=-1)
        weights_TK = functional.softmax(base_TK, dim=-1) + moved_TK
        return changed_TE, weights_TK.to(hidden_TD.dtype), indices_TK


def route(
    logits_TE: torch.Tensor, experts_per_token: int, selection_bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights (T, K), the softmax over each token's K largest logits only, and the experts' indices (T, K).

    selection_bias_E: added to the logits for finding the largest; the weights do not feel it.
    """
    preferred_TE = logits_TE if selection_bias_E is None else logits_TE + selection_bias_E
    indices_TK = torch.topk(preferred_TE, experts_per_token, dim=-1).indices
    return functional.softmax(logits_TE.gather(-1, indices_TK), dim=-1), indices_TK


class PackedMixture(nn.Module):
    """The feed-forward block: router, packed experts and, if attached, `shared_expert` and `router_delta`.

    Gives (B, S, D) and the gate weights (T, K) for (B, S, D). With its additions off, or absent, it computes exactly
    what the base does.
    """

    def __init__(self, config: NexusGptOssConfig):
        super().__init__()
        self.router = PackedRouter(config)
        self.experts = PackedExperts(
            experts=config.num_local_experts,
            hidden_size=config.hidden_size,
            width=config.intermediate_size,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
        )
        self.shared_expert = new_shared_expert(config) if config.shared_expert_width else None
        self.router_delta = new_router_delta(config) if config.has_router_delta else None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        delta_TE = selection_bias_E = None
        if self.router_delta is not None and not self.router_delta.is_off:
            delta_TE = self.router_delta(hidden_TD.to(self.router_delta.weight.dtype))
            selection_bias_E = self.router_delta.selection_bias
        _, weights_TK, indices_TK = self.router(hidden_TD, delta_TE, selection_bias_E)
        output_TD = self.experts(hidden_TD, indices_TK, weights_TK)
        if self.shared_expert is not None and not self.shared_expert.is_off:
            output_TD = output_TD + self.shared_expert(hidden_TD)
        return output_TD.view(hidden_states.shape), weights_TK


def new_shared_expert(config: NexusGptOssConfig) -> SharedExpert:
    """A shared expert of the configured width with the family's activation; its numbers are not set yet."""
    activation = partial(swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit)
    shared_expert = SharedExpert(config.hidden_size, config.shared_expert_width, activation, has_bias=True)
    # Read by _init_weights, which transformers calls for modules with parameters of their own only.
    shared_expert.down_proj.starts_at_zero = True  # type: ignore[assignment]
    return shared_expert


def new_router_delta(config: NexusGptOssConfig) -> RouterDelta:
    """A router change of zero."""
    return RouterDelta(config.hidden_size, config.num_local_experts)


class NexusGptOssDecoderLayer(GptOssDecoderLayer):
    """One layer; its forward is transformers', its feed-forward block is PackedMixture."""

    def __init__(self, config: NexusGptOssConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # the direct parent's would allocate dense experts
        self.hidden_size = config.hidden_size
        self.self_attn = NexusGptOssAttention(config=config, layer_idx=layer_idx)
        self.mlp = PackedMixture(config)  # type: ignore[assignment]
        self.input_layernorm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class NexusGptOssPreTrainedModel(StrictlyLoaded, GptOssPreTrainedModel):
    """What model and causal language model share: initialisation, what can be recorded, and strict loading."""

    config: NexusGptOssConfig
    config_class = NexusGptOssConfig
    _no_split_modules = ["NexusGptOssDecoderLayer"]  # noqa: RUF012 - transformers' class attribute
    # A step of 1e-5 vanishes in bfloat16; the changes are small enough (0.01% of the model) to stay float32.
    _keep_in_fp32_modules_strict = ["router_delta"]  # noqa: RUF012
    _can_compile_fullgraph = False  # the loop over experts depends on the data
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(PackedRouter, index=0),
        "hidden_states": NexusGptOssDecoderLayer,
        "attentions": NexusGptOssAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random, but zero where an addition must change nothing; packed experts are only ever loaded, so zero too."""
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False) or isinstance(module, RouterDelta | PackedExperts):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, PackedRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.normal_(module.bias, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **keywords: Any) -> Any:
        """As transformers', but strict: CheckpointError names tensors that are missing, unknown or misshapen."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *arguments, **keywords)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.requires_grad_(False)  # loading sets it for the biases
        return loaded

    @classmethod
    def refuse_damaged(cls, folder: Path, config: dict[str, Any]) -> None:
        """Shards that are missing or cut short, and packed experts of another type than bytes, which transformers would
        cast without a word."""
        mistyped = [
            f"{entry.name} {entry.dtype}, not U8"
            for entry in CheckpointReader(folder).entries.values()
            if ".mlp.experts." in entry.name and entry.name.endswith(("_blocks", "_scales")) and entry.dtype != "U8"
        ]
        if mistyped:
            raise CheckpointError(f"{folder}: its packed experts are not bytes ({some(mistyped)}); download it again")


class NexusGptOssModel(NexusGptOssPreTrainedModel, GptOssModel):
    """The decoder without the language-model head."""

    def __init__(self, config: NexusGptOssConfig):
        super(GptOssModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [NexusGptOssDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = NexusRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **keywords: Any,
    ) -> Any:
        """As transformers', but long sequences are read without holding their scores (`nexus_gpt_oss.attention`), and
        documents packed into one sequence, whose position_ids begin again with each, don't see each other: transformers
        keeps them apart for other families, for this one it only numbers them anew.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None
        is_packed = (
            position_ids is not None and attention_mask is None and past_key_values is None and use_cache is False
        )
        documents = position_ids if is_packed else None
        masks = visibilities(self.config, inputs_embeds, attention_mask, documents, past_key_values, keywords)
        if masks is not None:
            attention_mask = masks
        elif is_packed:
            about: dict[str, Any] = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": None,
                "past_key_values": None,
                "position_ids": position_ids,
            }
            attention_mask = {
                "full_attention": create_causal_mask(**about),
                "sliding_attention": create_sliding_window_causal_mask(**about),
            }
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **keywords,
        )


class NexusGptOssForCausalLM(NexusGptOssPreTrainedModel, GptOssForCausalLM):
    """GPT-OSS as a causal language model, base or converted."""

    def __init__(self, config: NexusGptOssConfig):
        super(GptOssForCausalLM, self).__init__(config)
        self.model = NexusGptOssModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def attach_shared_expert(self, width: int) -> None:
        """Give every layer a shared expert with random features and a zero output, of the model's type and device.

        Raises UsageError if width is not positive or the model has shared experts already.
        """
        refuse_unless_attachable(self.config, width)
        self.config.shared_expert_width = width
        for layer in self.model.layers:
            weight = layer.mlp.router.weight
            shared_expert = new_shared_expert(self.config).to(device=weight.device, dtype=weight.dtype)
            for linear in shared_expert.children():
                self._init_weights(linear)
            layer.mlp.shared_expert = shared_expert

    def attach_router_delta(self) -> None:
        """Give every router a change of zero, in float32; a model that has them is left alone."""
        if self.config.has_router_delta:
            return
        self.config.has_router_delta = True
        for layer in self.model.layers:
            layer.mlp.router_delta = new_router_delta(self.config).to(layer.mlp.router.weight.device)
