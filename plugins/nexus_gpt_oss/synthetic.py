"""A model of gpt-oss's real shapes with random numbers, for benchmarks and tests at scale without the weights.

    python -m nexus_gpt_oss.synthetic --shape 120b --layers 1 --out DIR

Names, types and shapes are the published ones; blocks are uniform random bytes and scales lie where the published
ones do, so that activations stay finite and decoding costs what it costs. `write` never has more than one tensor in
memory; `build` makes the model on a device, without any files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_core.checkpoint.reader import SINGLE_NAME, read_header
from nexus_core.checkpoint.writer import TensorPlan, shard_writer, write_index, write_json
from nexus_core.errors import NexusError, UsageError
from nexus_core.progress import Progress
from nexus_gpt_oss.checkpoint import GROUP, describe, expert_tensor
from nexus_gpt_oss.mxfp4 import GROUP_BYTES

if TYPE_CHECKING:
    from nexus_gpt_oss.modeling import NexusGptOssForCausalLM

# What differs from gpt-oss-120b. The tiny one is for trying out what is meant for the others.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        # The published one lies outside of so small a vocabulary, as do the ends of texts.
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}

# Files that make up the tokenizer of the embedded model, which stands in for the published one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EMBEDDED = Path(__file__).parent / "embedded" / "tiny-gpt-oss"

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
    published = {
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
        "num_local_experts": 128,
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
    return published | SHAPES[shape] | {"num_hidden_layers": count}


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
    return fill(name, torch.empty(plan.shape, dtype=plan.dtype), generator)


def fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The tensor, overwritten with numbers that make sense under its name. generator: of the tensor's device."""
    if name.endswith("_blocks"):
        # Eight bytes at a time: single bytes are drawn one number each.
        tensor.view(-1).view(torch.int64).random_(-(2**63), None, generator=generator)
        return tensor
    if name.endswith("_scales"):
        return tensor.random_(SCALES.start, SCALES.stop, generator=generator)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, WEIGHT_DEVIATION, generator=generator)


def build(
    shape: str,
    layers: int | None = None,
    device: str = "cpu",
    *,
    seed: int = 0,
) -> NexusGptOssForCausalLM:
    """A base model of a shape, in bfloat16 and evaluation mode, made on a device without files: no more memory than it
    takes.

    On a CPU its tensors are those that `write` gives for the same seed; a GPU draws its own.
    """
    return build_of(config(shape, layers), device, seed=seed)


def build_of(
    config: Mapping[str, Any], device: str = "cpu", *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> NexusGptOssForCausalLM:
    """As `build`, of a whole config and in any type."""
    from transformers.initialization import no_init_weights

    from nexus_gpt_oss.configuration import NexusGptOssConfig
    from nexus_gpt_oss.modeling import NexusGptOssForCausalLM
    from nexus_gpt_oss.plugin import nexus_converted_config

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = NexusGptOssForCausalLM(NexusGptOssConfig.from_dict(nexus_converted_config(config, width=0)))
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name in tensor_plans(config):
            fill(name, model.get_parameter(name).data, generator)
    return model.requires_grad_(False).eval()


def write(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    tokenizer: bool = False,
) -> int:
    """Write a random checkpoint into a new or empty folder and return its bytes.

    tokenizer: with the embedded model's, which uses the first tokens of the vocabulary only; the published one is not
    ours to bring. Raises UsageError if the folder holds something, StageError if it cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    plans = tensor_plans(config)
    shards = list(_shards(plans))
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
    for name in TOKENIZER_FILES if tokenizer else ():
        shutil.copyfile(EMBEDDED / name, folder / name)
    return total_bytes


def _shards(plans: Mapping[str, TensorPlan]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, plan in plans.items():
        if names and filled + plan.stored_bytes > SHARD_BYTES:
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
    parser.add_argument("--tokenizer", action="store_true", help="with the embedded model's tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        chosen = config(arguments.shape, arguments.layers)
        written = write(arguments.out, chosen, seed=arguments.seed, tokenizer=arguments.tokenizer)
    except NexusError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{arguments.out}: {written:,} bytes")


if __name__ == "__main__":
    main()
