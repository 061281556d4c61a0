"""What the layouts tell of published checkpoints from their configs alone, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import CONFIGS, write_family_checkpoint

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import CheckpointError
from nexus_core.models import load
from nexus_core.plugins import Family, installed

# The fields of published config.json files that sizes depend on.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "granite-3.0-1b-a400m": {
        "model_type": "granitemoe", "vocab_size": 49155, "hidden_size": 1024, "intermediate_size": 512,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32,
        "num_experts_per_tok": 8, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

# What the published checkpoints hold. DeepSeek-V3's has, in float32, 58 * 256 selection biases among them.
PARAMETERS = {
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "OLMoE-1B-7B": 6_919_161_856,
    "granite-3.0-1b-a400m": 1_334_628_352,
    "DeepSeek-V3": 671_026_419_200,
}
FLOAT32_PARAMETERS = {"DeepSeek-V3": 58 * 256}


def family(config: dict[str, Any]) -> Family:
    return installed().family(config, "test")


@pytest.mark.parametrize("name", PUBLISHED)
def test_stored_bytes_are_those_of_the_published_model(name: str) -> None:
    stored = family(PUBLISHED[name]).hook.nexus_stored_bytes(config=PUBLISHED[name])
    assert sum(stored.values()) == 2 * PARAMETERS[name] + 2 * FLOAT32_PARAMETERS.get(name, 0)


def test_fp8_halves_the_matrices_and_adds_a_scale_per_block() -> None:
    config = PUBLISHED["DeepSeek-V3"]
    hook = family(config).hook
    dense, packed = (hook.nexus_stored_bytes(config=c) for c in (config, config | {"quantization_config": FP8}))
    assert packed["routed_experts"] == dense["routed_experts"] // 2 + dense["routed_experts"] // 2 // 128**2 * 4
    assert packed["router"] == dense["router"]
    assert packed["embeddings"] == dense["embeddings"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_description_comes_from_the_config_alone(name: str) -> None:
    config = PUBLISHED[name]
    described = family(config).hook.nexus_describe_moe(config=config)
    dense = config.get("first_k_dense_replace", 0)
    assert described.layers == tuple(range(dense, config["num_hidden_layers"]))
    assert described.experts in (8, 32, 60, 64, 128, 256)
    assert described.storage == "bfloat16"
    assert described.weights_sum_to_one == (name in ("Mixtral-8x7B", "Qwen3-30B-A3B", "granite-3.0-1b-a400m"))
    converted = family(config).hook.nexus_converted_config(config=config, width=64)
    again = family(converted).hook.nexus_describe_moe(config=converted)
    assert (again.model_type, again.shared_expert_width) == (f"nexus_{config['model_type']}", 64)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, (1, 3)),
        ({"num_hidden_layers": 6, "decoder_sparse_step": 3}, (2, 5)),
        ({"num_hidden_layers": 3, "mlp_only_layers": None}, (0, 1, 2)),
    ],
)
def test_dense_layers_are_left_out(settings: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = PUBLISHED["Qwen3-30B-A3B"] | settings
    assert family(config).hook.nexus_describe_moe(config=config).layers == layers


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen3-30B-A3B", {"num_experts": None}, "num_experts or num_local_experts is missing"),
        ("Qwen3-30B-A3B", {"hidden_size": "wide"}, "hidden_size is 'wide', not a positive number"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": list(range(48))}, "no layer has experts"),
        ("Mixtral-8x7B", {"torch_dtype": "int8"}, "dtype 'int8'"),
        ("Mixtral-8x7B", {"quantization_config": {"quant_method": "awq"}}, "dense experts only"),
        ("DeepSeek-V3", {"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt is 'e5m2'"),
        ("DeepSeek-V3", {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        ("DeepSeek-V3", {"quantization_config": FP8 | {"modules_to_not_convert": ["x"]}}, "modules_to_not_convert"),
        ("DeepSeek-V3", {"quantization_config": FP8 | {"weight_block_size": None}}, "weight_block_size is None"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    config = PUBLISHED[name] | changes
    with pytest.raises(CheckpointError, match=message):
        family(config).hook.nexus_describe_moe(config=config)


def test_every_layout_is_of_a_different_type_and_claims_its_converted_one_too() -> None:
    for model_type in CONFIGS:
        assert family({"model_type": model_type}).name == family({"model_type": f"nexus_{model_type}"}).name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "missing tensors: .*experts.3.w1.weight"),
        ("model.layers.1.block_sparse_moe.experts.8.w2.weight", "unknown tensors: .*experts.8.w2.weight"),
        ("model.layers.1.block_sparse_moe.gate.weight", "another shape: .*mlp.gate.weight"),
    ],
)
def test_an_expert_too_few_or_too_many_is_refused_by_its_name_on_disk(
    tmp_path: Path, change: str, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_family_checkpoint(tmp_path / "base", "mixtral")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].get(change, "model-00001-of-00004.safetensors")
    tensors = load_file(shard)
    if "experts.3" in change:
        del tensors[change], index["weight_map"][change]
    else:
        tensors[change] = torch.zeros(2, 3, dtype=torch.bfloat16)
        index["weight_map"][change] = shard.name
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_expert_is_read_without_touching_others(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_family_checkpoint(tmp_path / "base", "granitemoe"))
    read: list[tuple[str, int | None]] = []
    original = checkpoint.reader.read

    def watched(name: str, index: int | None = None) -> torch.Tensor:
        read.append((name, index))
        return original(name, index)

    checkpoint.reader.read = watched  # type: ignore[method-assign]
    weights = checkpoint.family.hook.nexus_read_expert(
        reader=checkpoint.reader, config=checkpoint.config, layer=1, expert=5, dtype=torch.float32
    )
    prefix = "model.layers.1.block_sparse_moe"
    assert read == [(f"{prefix}.input_linear.weight", 5), (f"{prefix}.output_linear.weight", 5)]
    stacked = original(f"{prefix}.input_linear.weight")[5].float()
    assert torch.equal(torch.cat([weights.gate, weights.up]), stacked)


def test_importing_the_plugins_brings_nothing_heavy() -> None:
    script = (
        "import sys, nexus_hf_moe.plugin, nexus_deepseek.plugin\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
