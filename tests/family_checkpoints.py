"""Tiny random checkpoints of every family, written by transformers itself, as its users' are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LAYERS = 2
EXPERTS = 8
VOCABULARY = 320

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# What sets each family apart: sizes under its own names, and every switch that its routing has.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 8,
        "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "num_experts": EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 48,
        "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "decoder_sparse_step": 2,
    },
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 16},
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 16},
    "granitemoe": {
        "num_local_experts": EXPERTS, "intermediate_size": 16, "tie_word_embeddings": True,
        "residual_multiplier": 0.5, "embedding_multiplier": 4.0, "logits_scaling": 2.0,
    },
}  # fmt: skip


def write_family_checkpoint(
    folder: Path, model_type: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """A folder with config.json and weights as transformers writes them; returns it.

    Numbers are random, of a size that keeps activations near 1 and routes tokens unevenly. changes: of the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = COMMON | CONFIGS[model_type] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.5 * tensor.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    _leave_out_defaults_of_the_writer(folder)
    return folder


def _leave_out_defaults_of_the_writer(folder: Path) -> None:
    # The published ones were written by older versions, without these.
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("transformers_version", None)
    file.write_text(json.dumps(config, indent=2))
