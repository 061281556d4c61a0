"""What the plugin tells core of a checkpoint: sizes, bytes, single experts, and why it refuses one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_checkpoints import published_config, write_tiny_checkpoint
from gpt_oss_reference import ReferenceGptOss
from nexus_gpt_oss import plugin

from nexus_core.additions import additions
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import CheckpointError
from nexus_core.models import load
from nexus_core.plugins import Family, Plugins
from nexus_core.types import ExpertWeights

GPT_OSS_20B = published_config(layers=24, experts=32)
GPT_OSS_120B = published_config(layers=36, experts=128)


@pytest.fixture(scope="module")
def family() -> Family:
    plugins = Plugins()
    plugins.register(plugin, "gpt_oss", "in the tree")
    return plugins.family(GPT_OSS_20B, "test")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "base")


def test_it_claims_base_and_converted_checkpoints_only() -> None:
    claimed = [plugin.nexus_claims({"model_type": name}) for name in ("gpt_oss", "nexus_gpt_oss", "mixtral", None)]
    assert claimed == [True, True, False, False]
    assert not plugin.nexus_claims({})


@pytest.mark.parametrize(("config", "total"), [(GPT_OSS_20B, 13_761_264_768), (GPT_OSS_120B, 65_248_815_744)])
def test_stored_bytes_sum_to_the_published_checkpoints(family: Family, config: dict[str, Any], total: int) -> None:
    assert sum(family.hook.nexus_stored_bytes(config=config).values()) == total


@pytest.mark.parametrize(("config", "expected"), [(GPT_OSS_20B, 423_567_360), (GPT_OSS_120B, 1_694_269_440)])
def test_stored_bytes_of_one_layers_experts(family: Family, config: dict[str, Any], expected: int) -> None:
    stored = family.hook.nexus_stored_bytes(config=config)
    assert stored["routed_experts"] == expected * config["num_hidden_layers"]
    assert stored["shared_experts"] == 0


def test_a_full_width_shared_expert_of_120b_is_1_79_gigabytes(family: Family) -> None:
    config = family.hook.nexus_converted_config(config=GPT_OSS_120B, width=2880)
    stored = family.hook.nexus_stored_bytes(config=config)["shared_experts"]
    assert stored == 36 * (3 * 2880 * 2880 + 3 * 2880) * 2
    assert round(stored / 1e9, 2) == 1.79


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_bytes_are_those_of_the_files(base: Path, tmp_path: Path, family: Family, dtype: torch.dtype) -> None:
    model = load(base, dtype=dtype)
    folders = [base]
    for name, change in (
        ("shared", lambda: plugin.nexus_attach_shared_expert(model, 40)),
        ("routed", lambda: plugin.nexus_attach_router_delta(model)),
    ):
        change()
        model.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        stored = sum(entry.stored_bytes for entry in CheckpointReader(folder).entries.values())
        assert sum(family.hook.nexus_stored_bytes(config=config).values()) == stored


def test_the_description_comes_from_the_config_alone(family: Family) -> None:
    described = family.hook.nexus_describe_moe(config=GPT_OSS_120B)
    assert described.layers == tuple(range(36))
    assert (described.experts, described.experts_per_token, described.vocabulary_size) == (128, 4, 201088)
    assert (described.hidden_size, described.expert_width, described.shared_expert_width) == (2880, 2880, 0)
    assert (described.storage, described.weights_sum_to_one, described.has_expert_biases) == ("mxfp4", True, True)
    converted = family.hook.nexus_converted_config(config=GPT_OSS_120B, width=96)
    again = family.hook.nexus_describe_moe(config=converted)
    assert (again.model_type, again.shared_expert_width) == ("nexus_gpt_oss", 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": None}, "quant_method None, not 'mxfp4'.* only one NEXUS reads"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method 'bitsandbytes'"),
        ({"model_type": "nexus_gpt_oss", "expert_storage": "bfloat16"}, "expert_storage 'bfloat16'"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not a multiple of 32"),
        ({"dtype": "float8"}, "dtype 'float8'"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(family: Family, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family.hook.nexus_stored_bytes(config=GPT_OSS_20B | change)


def test_dense_experts_are_refused_before_anything_is_read(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    for shard in base.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match="not in GPT-OSS's packed 4-bit form"):
        load(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_expert_is_the_reference_expert_in_canonical_layout(base: Path, family: Family, dtype: torch.dtype) -> None:
    checkpoint, reference = open_checkpoint(base), ReferenceGptOss(base)
    for layer, expert in ((0, 0), (1, 7)):
        weights = family.hook.nexus_read_expert(
            reader=checkpoint.reader, config=checkpoint.config, layer=layer, expert=expert, dtype=dtype
        )
        gate_up, down = (reference.matrix(layer, name, expert) for name in ("gate_up_proj", "down_proj"))
        biases = reference.tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"][expert]
        down_bias = reference.tensors[f"model.layers.{layer}.mlp.experts.down_proj_bias"][expert]
        expected = ExpertWeights(gate_up[0::2], gate_up[1::2], down, biases[0::2], biases[1::2], down_bias)
        for name, tensor in vars(expected).items():
            found = getattr(weights, name)
            assert found.dtype == dtype
            assert torch.equal(found, tensor.to(dtype)), name
        assert weights.width == 32

        # And it computes what the published architecture's expert does.
        hidden = torch.randn(64, generator=torch.Generator().manual_seed(expert)).to(dtype)
        gate, up = weights.gate @ hidden + weights.gate_bias, weights.up @ hidden + weights.up_bias
        activated = family.hook.nexus_neuron_activations(config=checkpoint.config, gate=gate, up=up)
        output = (weights.down @ activated + weights.down_bias).float()
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        assert (output - reference.expert(hidden.float(), layer, expert)).norm() / output.norm() < tolerance


def test_expert_locations_name_every_packed_byte(base: Path, family: Family) -> None:
    checkpoint = open_checkpoint(base)
    locations = family.hook.nexus_enumerate_experts(config=checkpoint.config)
    assert [(where.layer, where.expert) for where in locations] == [(la, ex) for la in range(2) for ex in range(8)]
    read = sum(checkpoint.reader.read(part.name, part.index).nbytes for where in locations for part in where.parts)
    assert read == family.hook.nexus_stored_bytes(config=checkpoint.config)["routed_experts"]


def test_an_expert_that_is_not_there_is_refused(base: Path, family: Family) -> None:
    checkpoint = open_checkpoint(base)
    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks.* has no slice 8"):
        family.hook.nexus_read_expert(
            reader=checkpoint.reader, config=checkpoint.config, layer=0, expert=8, dtype=torch.float32
        )


def test_dequantize_takes_blocks_and_scales_and_leaves_plain_tensors_to_core(base: Path, family: Family) -> None:
    checkpoint, reference = open_checkpoint(base), ReferenceGptOss(base)
    prefix = "model.layers.0.mlp.experts.down_proj"
    roles = {role: reference.tensors[f"{prefix}_{role}"] for role in ("blocks", "scales")}
    dense = family.hook.nexus_dequantize(config=checkpoint.config, tensors=roles, dtype=torch.float32)
    assert torch.equal(dense[3], reference.matrix(0, "down_proj", 3))
    bias = reference.tensors[f"{prefix}_bias"]
    plain = family.hook.nexus_dequantize(config=checkpoint.config, tensors={"bias": bias}, dtype=torch.float32)
    assert torch.equal(plain, bias.float())


def test_gate_weights_are_those_of_the_running_router(base: Path, family: Family) -> None:
    checkpoint, model = open_checkpoint(base), load(base, dtype=torch.float32)
    heard: list[Any] = []
    blocks = family.hook.nexus_moe_blocks(model=model)
    assert [block.layer for block in blocks] == [0, 1]
    blocks[1].router.register_forward_hook(lambda module, inputs, output: heard.append(output))
    model(torch.arange(30)[None])
    output = family.hook.nexus_router_logits(output=heard[0])
    weights_TK, indices_TK = family.hook.nexus_gate_weights(config=checkpoint.config, logits=output.logits, router={})
    assert torch.equal(weights_TK, output.weights)
    assert torch.equal(indices_TK, output.indices)
    torch.testing.assert_close(weights_TK.sum(dim=-1), torch.ones(30))


def test_shared_expert_tensors_and_config_make_a_checkpoint_that_loads(
    base: Path, tmp_path: Path, family: Family
) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    gate, up, down = torch.randn(3, 24, 64, generator=generator)
    config = json.loads((base / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        weights = ExpertWeights(gate + layer, up, down.T, gate_bias=torch.ones(24))
        tensors |= family.hook.nexus_shared_expert_tensors(config=config, layer=layer, weights=weights)
    assert len(tensors) == 12
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for shard in base.glob("*.safetensors"):
        tensors |= load_file(shard)
    folder = tmp_path / "converted"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.hook.nexus_converted_config(config=config, width=24)))
    shared = additions(load(folder))
    assert len(shared) == 2
    assert torch.equal(shared[1].gate_proj.weight, (gate + 1).bfloat16())
    assert torch.equal(shared[0].down_proj.weight, down.T.bfloat16())
    assert shared[0].gate_proj.bias.tolist() == [1.0] * 24
    assert not shared[0].down_proj.bias.any()


def test_converting_changes_only_what_it_says(family: Family) -> None:
    converted = family.hook.nexus_converted_config(config=GPT_OSS_20B, width=64)
    changed = {name for name in converted if converted[name] != GPT_OSS_20B.get(name)}
    assert changed == {
        "architectures",
        "dtype",
        "expert_storage",
        "has_router_delta",
        "model_type",
        "shared_expert_width",
    }
    assert set(GPT_OSS_20B) - set(converted) == {"quantization_config"}


def test_registering_twice_is_harmless() -> None:
    from transformers import AutoConfig

    plugin.nexus_register_auto()
    plugin.nexus_register_auto()
    assert AutoConfig.for_model("nexus_gpt_oss", num_hidden_layers=1).expert_storage == "mxfp4"


def test_embedded_files_are_named_with_their_kind() -> None:
    files = {file.name: file for file in plugin.nexus_embedded_files()}
    assert {name: file.kind for name, file in files.items()} == {
        "tiny-gpt-oss": "checkpoint",
        "prose": "data",
        "code": "data",
        "arithmetic": "data",
    }
    assert all(file.path.is_relative_to(Path(plugin.__file__).parent) for file in files.values())


def test_importing_the_plugin_brings_nothing_heavy() -> None:
    import subprocess
    import sys

    script = "import sys, nexus_gpt_oss.plugin; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
