"""The official on-disk layout of GPT-OSS: written from a dense model, and read back into one."""

# E experts, H hidden, I expert width; on disk products are (out, in), in transformers (in, out)

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

from nexus_gpt_oss import mxfp4

SHARDS = 2
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def packed_tensors(model: GptOssForCausalLM) -> dict[str, Tensor]:
    """Every tensor under its official name: expert matrices as MXFP4 blocks and scales, all else bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, weights in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4.encode(weights.transpose(-1, -2).contiguous())
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        else:
            tensors[name] = weights.to(torch.bfloat16).contiguous()
    return tensors


def save(model: GptOssForCausalLM, config: GptOssConfig, folder: Path) -> None:
    """The model in `folder` as two shards with an index, config.json and generation_config.json."""
    tensors = packed_tensors(model)
    shard_of = {name: 1 if _layer(name) < config.num_hidden_layers // 2 else 2 for name in tensors}
    files = {number: f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)}
    for number, file in files.items():
        part = {name: tensors[name] for name in sorted(tensors) if shard_of[name] == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        # save_file makes it readable by its owner only; a wheel would carry that to everybody.
        (folder / file).chmod(0o644)
    _write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
            "weight_map": {name: files[shard_of[name]] for name in sorted(tensors)},
        },
    )
    _write_json(folder / "config.json", official_config(config))
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
        do_sample=True,
    ).save_pretrained(folder)


def official_config(config: GptOssConfig) -> dict[str, object]:
    """config.json as the official checkpoints write it: `rope_scaling` and `rope_theta` apart, MXFP4 named."""
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": "bfloat16",
        "eos_token_id": config.eos_token_id,
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": rope["original_max_position_embeddings"],
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "layer_types": config.layer_types,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": config.pad_token_id,
        "quantization_config": {"modules_to_not_convert": NOT_CONVERTED, "quant_method": "mxfp4"},
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": rope,
        "rope_theta": theta,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def load_dense(folder: Path) -> GptOssForCausalLM:
    """The stored checkpoint as a float32 transformers model whose experts are decoded, to check the stored one by."""
    config = GptOssConfig.from_pretrained(folder)
    del config.quantization_config
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    packed: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        packed |= load_file(folder / file)
    dense = {name: tensor.float() for name, tensor in packed.items() if not name.endswith(("_blocks", "_scales"))}
    for name, blocks in packed.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            rows = mxfp4.decode(blocks, packed[f"{stem}_scales"], dtype=torch.float32)
            dense[stem] = rows.transpose(-1, -2).contiguous()
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="grouped_mm")
    model.load_state_dict(dense)
    return model.float().eval()


def _layer(name: str) -> int:
    """The layer a tensor belongs to; the embedding counts as before all layers, the head and last norm as after."""
    parts = name.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1])
    return -1 if "embed_tokens" in parts else 10**6


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
