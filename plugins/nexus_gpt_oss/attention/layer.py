"""GPT-OSS's attention layer, for long sequences without a matrix of scores, and what it is told to see."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, apply_rotary_pos_emb

from nexus_gpt_oss.attention.choice import EAGER, Sizes, attention_for, avoids_scores
from nexus_gpt_oss.attention.visibility import Visibility, documents

# B sequences, S positions, D hidden size


class NexusGptOssAttention(GptOssAttention):
    """transformers' attention, but where the mask is a `Visibility`: there it writes no scores and gives no weights."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(attention_mask, Visibility):
            answer: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **keywords
            )
            return answer
        in_heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(in_heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        sizes = Sizes(query.shape[1], key.shape[1], self.head_dim, self.config.sliding_window)
        attend = attention_for(query.device, query.dtype, sizes)
        mixed = attend(query, key, value, self.sinks, attention_mask, self.scaling)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


def visibilities(
    config: Any,
    inputs_BSD: torch.Tensor | None,
    attention_mask: Any,
    position_ids_BS: torch.Tensor | None,
    past_key_values: Cache | None,
    keywords: dict[str, Any],
) -> dict[str, Visibility] | None:
    """Masks by layer type for a sequence whose scores should not be held; None leaves it to transformers.

    It is left where someone asks for the weights, has chosen another attention, drops some of them out, gives a mask of
    his own making, or goes on from a cache. attention_mask: (B, S), 0 for padding. position_ids: where they don't go on
    by one, another document begins; None if they mean nothing.
    """
    if inputs_BSD is None:
        return None
    batch, length = inputs_BSD.shape[:2]
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.shape == (batch, length)
    starts_empty = past_key_values is None or (
        isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() == 0
    )
    if (
        config._attn_implementation != EAGER
        or config.attention_dropout
        or keywords.get("output_attentions", config.output_attentions)
        or not (attention_mask is None or is_padding_mask)
        or not starts_empty
        or not avoids_scores(length, inputs_BSD.device)
    ):
        return None
    padding_BS = attention_mask if is_padding_mask and not bool(attention_mask.all()) else None
    positions_BS = None if position_ids_BS is None else position_ids_BS.expand(batch, -1)
    documents_BS = documents(positions_BS, padding_BS)
    return {
        "full_attention": Visibility(documents_BS, None),
        "sliding_attention": Visibility(documents_BS, config.sliding_window),
    }
