"""Tiny random checkpoints of every family, written by transformers itself, as its users' are."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpt_oss_checkpoints import write_tiny_checkpoint

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
    "glm4_moe": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 48, "num_hidden_layers": 3,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": True,
    },
    "dots1": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 48, "num_hidden_layers": 3,
        "first_k_dense_replace": 1, "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 48, "num_hidden_layers": 4,
        "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 2,
        "moe_num_shared_experts": 1, "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": 24, "intermediate_size": 48, "num_hidden_layers": 3,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip

FP8_BLOCK = (16, 20)


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
            if "correction_bias" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.5 * tensor.shape[-1] ** -0.5)
    exact = ("e_score_correction_bias", *(model._keep_in_fp32_modules_strict or ()))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if any(part in name for part in exact)}
    model.to(dtype)
    for name, tensor in kept.items():  # published in float32, as its class says
        module, _, own = name.rpartition(".")
        getattr(model.get_submodule(module), own).data = tensor
    model.save_pretrained(folder, max_shard_size="40KB")
    _leave_out_defaults_of_the_writer(folder)
    return folder


def _leave_out_defaults_of_the_writer(folder: Path) -> None:
    # The published ones were written by older versions, without these.
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("transformers_version", None)
    file.write_text(json.dumps(config, indent=2))


def write_fp8_checkpoint(folder: Path, **changes: Any) -> Path:
    """A deepseek_v3 in the published storage: every matrix of a layer but the router's is fp8 with block scales."""
    from safetensors.torch import load_file, save_file

    write_family_checkpoint(folder, "deepseek_v3", **changes)
    weight_map = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in list(tensors):
            if name.endswith(("_proj.weight", "_mqa.weight")):
                tensors[name], tensors[f"{name}_scale_inv"] = _quantized(tensors[name].float())
        save_file(tensors, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(FP8_BLOCK),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales, block by block, the largest number of each at e4m3's largest, 448."""
    rows, columns = (-(-size // length) for size, length in zip(weight.shape, FP8_BLOCK, strict=True))
    scales, values = torch.empty(rows, columns), torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            place = block_of(row, column)
            scales[row, column] = weight[place].abs().max() / 448
            values[place] = weight[place] / scales[row, column]
    return values.to(torch.float8_e4m3fn), scales


def block_of(row: int, column: int) -> tuple[slice, slice]:
    """The numbers that share the scale at this place."""
    rows, columns = FP8_BLOCK
    return slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)


# Every family and every storage of it: what it is called in test names, and what writes one into a new folder.
WRITERS: dict[str, Callable[[Path], Path]] = {"gpt_oss": write_tiny_checkpoint} | {
    model_type: partial(write_family_checkpoint, model_type=model_type) for model_type in CONFIGS
}
WRITERS["deepseek_v3_fp8"] = write_fp8_checkpoint
