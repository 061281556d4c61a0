"""Writes small random GPT-OSS checkpoints in the official layout: MXFP4 experts, two shards and an index.

Nothing here uses the code under test, so that a mistake in it cannot hide itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HEAD_DIM = 64
QUERY_HEADS = 4
KEY_VALUE_HEADS = 2


def published_config(
    *, layers: int, experts: int, hidden: int = 2880, width: int = 2880, **changes: Any
) -> dict[str, Any]:
    """A config.json with the fields of the published ones; `changes` replaces or adds some."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 2,
        "experts_per_token": 4,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": width,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 0,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    } | changes


def write_tiny_checkpoint(
    folder: Path,
    *,
    layers: int = 2,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    width: int = 32,
    vocabulary: int = 128,
    seed: int = 0,
    tokenizer: bool = False,
) -> Path:
    """A folder with config.json, two safetensors shards, their index and, if asked, a byte-level tokenizer.

    Numbers are random, of a size that keeps activations near 1, lets some reach the activation's clamps, and routes
    tokens unevenly. vocabulary: at least 16 more than the 256 bytes if there is a tokenizer. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(
        layers=layers,
        experts=experts,
        hidden=hidden,
        width=width,
        vocab_size=vocabulary,
        num_experts_per_tok=top_k,
        experts_per_token=top_k,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
    )
    tensors = random_tensors(config, seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(tensors)
    # The split falls inside a layer, as it does in the published checkpoints.
    shards = {"model-00001-of-00002.safetensors": names[: len(names) // 2]}
    shards["model-00002-of-00002.safetensors"] = names[len(names) // 2 :]
    weight_map = {}
    for file_name, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if tokenizer:
        _write_tokenizer(folder, vocabulary)
    return folder


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint with this config, by their official names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(torch.bfloat16)

    def packed(rows: int, columns: int) -> dict[str, torch.Tensor]:
        # At scale 2**-4 the sixteen numbers have a standard deviation of about 0.18.
        scale = 127 - 4 + torch.randint(-1, 2, (experts, rows, columns // 32), generator=generator)
        shape = (experts, rows, columns // 32, 16)
        return {
            "blocks": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            "scales": scale.to(torch.uint8),
            "bias": normal(experts, rows, std=0.2),
        }

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": normal(hidden, std=0.1, mean=1.0),
        "lm_head.weight": normal(config["vocab_size"], hidden, std=hidden**-0.5),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = normal(hidden, std=0.1, mean=1.0)
        tensors[prefix + "post_attention_layernorm.weight"] = normal(hidden, std=0.1, mean=1.0)
        tensors[prefix + "self_attn.sinks"] = normal(config["num_attention_heads"])
        for projection, inputs, outputs in (
            ("q", hidden, queries),
            ("k", hidden, keys),
            ("v", hidden, keys),
            ("o", queries, hidden),
        ):
            tensors[prefix + f"self_attn.{projection}_proj.weight"] = normal(outputs, inputs, std=inputs**-0.5)
            tensors[prefix + f"self_attn.{projection}_proj.bias"] = normal(outputs, std=0.1)
        tensors[prefix + "mlp.router.weight"] = normal(experts, hidden, std=2 * hidden**-0.5)
        tensors[prefix + "mlp.router.bias"] = normal(experts)
        for projection, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            for part, tensor in packed(rows, columns).items():
                tensors[prefix + f"mlp.experts.{projection}_{part}"] = tensor
    return tensors


def rewrite_tensors(folder: Path, *, drop: str | None = None, add: dict[str, torch.Tensor] | None = None) -> None:
    """Remove one tensor from a written checkpoint, or add some, index included."""
    from safetensors.torch import load_file

    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for file_name in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / file_name)
        if drop in tensors:
            del tensors[drop], index["weight_map"][drop]
        if add and file_name.startswith("model-00001"):
            tensors |= add
            index["weight_map"] |= dict.fromkeys(add, file_name)
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    index_file.write_text(json.dumps(index))


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|startoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>"]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    if len(pieces) > vocabulary:
        raise ValueError(f"a byte-level tokenizer has {len(pieces)} tokens, more than the vocabulary of {vocabulary}")
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        extra_special_tokens=["<|start|>", "<|message|>", "<|end|>"],
    )
    fast.chat_template = (
        "{% for message in messages %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
    )
    fast.save_pretrained(folder)
