"""A checkpoint of gpt-oss's real shapes with random numbers, for benchmarks and tests at scale without the weights.

    python -m nexus_gpt_oss.synthetic --shape 120b --layers 1 --out DIR

Names, types and shapes are the published ones; blocks are uniform random bytes and scales lie where the published
ones do, so that activations stay finite and decoding costs what it costs. Nothing larger than one tensor is in memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nexus_core.checkpoint.reader import SINGLE_NAME, read_header
from nexus_core.checkpoint.writer import TensorPlan, shard_writer, write_index, write_json
from nexus_core.errors import NexusError, UsageError
from nexus_core.progress import Progress
from nexus_gpt_oss.checkpoint import GROUP, describe, expert_tensor
from nexus_gpt_oss.mxfp4 import GROUP_BYTES

SHAPES = {
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}

# Published shards hold a little less than this.
SHARD_BYTES = 4_800_000_000

# 6 * 2**(120 - 127) = 0.05, the size of large weights at this width.
SCALES = range(117, 121)
WEIGHT_DEVIATION = 0.02


def config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The published config.json of a shape, "20b" or "120b"; layers: fewer or more than it has. Raises UsageError."""
    if shape not in SHAPES:
        raise UsageError(f"shape '{shape}' is not one of {', '.join(SHAPES)}")
    if layers is not None and layers < 1:
        raise UsageError(f"a model of {layers} layers: it must have at least one")
    count = SHAPES[shape]["num_hidden_layers"] if layers is None else layers
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": WEIGHT_DEVIATION,
        "intermediate_size": 2880,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(count)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": count,
        "num_key_value_heads": 8,
        "num_local_experts": SHAPES[shape]["num_local_experts"],
        "output_router_logits": False,
        "pad_token_id": 199999,
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
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
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
    }


def tensor_plans(config: Mapping[str, Any]) -> dict[str, TensorPlan]:
    """Every tensor of a checkpoint with this config, by name: type and shape."""
    moe = describe(config)
    D, F, E = moe.hidden_size, moe.expert_width, moe.experts
    heads, kv_heads, head_dim = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    bf16 = torch.bfloat16
    plans = {"model.embed_tokens.weight": TensorPlan(bf16, (moe.vocabulary_size, D))}
    for layer in moe.layers:
        prefix = f"model.layers.{layer}"
        for projection, outputs, inputs in (
            ("q_proj", heads * head_dim, D),
            ("k_proj", kv_heads * head_dim, D),
            ("v_proj", kv_heads * head_dim, D),
            ("o_proj", D, heads * head_dim),
        ):
            plans[f"{prefix}.self_attn.{projection}.weight"] = TensorPlan(bf16, (outputs, inputs))
            plans[f"{prefix}.self_attn.{projection}.bias"] = TensorPlan(bf16, (outputs,))
        plans[f"{prefix}.self_attn.sinks"] = TensorPlan(bf16, (heads,))
        plans[f"{prefix}.input_layernorm.weight"] = TensorPlan(bf16, (D,))
        plans[f"{prefix}.post_attention_layernorm.weight"] = TensorPlan(bf16, (D,))
        plans[f"{prefix}.mlp.router.weight"] = TensorPlan(bf16, (E, D))
        plans[f"{prefix}.mlp.router.bias"] = TensorPlan(bf16, (E,))
        for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            groups = columns // GROUP
            plans[expert_tensor(layer, f"{name}_blocks")] = TensorPlan(torch.uint8, (E, rows, groups, GROUP_BYTES))
            plans[expert_tensor(layer, f"{name}_scales")] = TensorPlan(torch.uint8, (E, rows, groups))
            plans[expert_tensor(layer, f"{name}_bias")] = TensorPlan(bf16, (E, rows))
    plans["model.norm.weight"] = TensorPlan(bf16, (D,))
    plans["lm_head.weight"] = TensorPlan(bf16, (moe.vocabulary_size, D))
    return plans


def random_tensor(name: str, plan: TensorPlan, generator: torch.Generator) -> torch.Tensor:
    """Valid random numbers for a tensor of this name: bytes, scales, norms of one, small weights."""
    if name.endswith("_blocks"):
        # Eight bytes at a time: single bytes are drawn one number each.
        words = torch.empty(plan.stored_bytes // 8, dtype=torch.int64)
        return words.random_(-(2**63), None, generator=generator).view(torch.uint8).view(plan.shape)
    tensor = torch.empty(plan.shape, dtype=plan.dtype)
    if name.endswith("_scales"):
        return tensor.random_(SCALES.start, SCALES.stop, generator=generator)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, WEIGHT_DEVIATION, generator=generator)


def write(folder: Path, config: Mapping[str, Any], *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a random checkpoint into a new or empty folder and return its bytes.

    Raises UsageError if the folder holds something, StageError if it cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    plans = tensor_plans(config)
    shards = list(_shards(plans, shard_bytes))
    generator = torch.Generator().manual_seed(seed)
    total_bytes = sum(plan.stored_bytes for plan in plans.values())
    with Progress("synthetic", total_bytes, "bytes") as progress:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_NAME
            with shard_writer(folder / file, {name: plans[name] for name in names}) as writer:
                for name in names:
                    writer.write(name, random_tensor(name, plans[name], generator))
                    progress.advance(plans[name].stored_bytes)
    if len(shards) > 1:
        write_index(folder, (e for shard in sorted(folder.glob("*.safetensors")) for e in read_header(shard).values()))
    write_json(folder / "config.json", dict(config))
    return total_bytes


def _shards(plans: Mapping[str, TensorPlan], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, plan in plans.items():
        if names and filled + plan.stored_bytes > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += plan.stored_bytes
    yield names


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nexus_gpt_oss.synthetic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--layers", type=int, help="layers, the published number if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        written = write(arguments.out, config(arguments.shape, arguments.layers), seed=arguments.seed)
    except NexusError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{arguments.out}: {written:,} bytes")


if __name__ == "__main__":
    main()
