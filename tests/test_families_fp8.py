"""fp8 with block scales: decoded exactly, kept in fp8, and the model it makes is that of the decoded checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from family_checkpoints import FP8_BLOCK, block_of, write_fp8_checkpoint
from nexus_deepseek.fp8 import Fp8Experts, Fp8Linear, Fp8Module, decode
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nexus_core.additions import additions
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.contract import disturb
from nexus_core.errors import CheckpointError, ShapeError
from nexus_core.models import load
from nexus_core.routing.parameters import is_selection_bias

TOKENS = torch.arange(40).reshape(2, 20)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def slow_decode(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Block by block, number by number's own type."""
    decoded = torch.empty(weight.shape)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = block_of(row, column)
            decoded[place] = weight[place].float() * scales[row, column]
    return decoded


def decoded_checkpoint(folder: Path, out: Path) -> Path:
    """The same model as a dense float32 checkpoint, for transformers."""
    tensors = tensors_of(folder)
    dense = {
        name: slow_decode(tensor, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    out.mkdir()
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8_checkpoint(tmp_path_factory.mktemp("fp8") / "base")


def test_decode_equals_the_slow_version_for_every_byte_and_ragged_blocks() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()].repeat(7)[: 37 * 41].reshape(37, 41)
    scales = torch.rand(math.ceil(37 / FP8_BLOCK[0]), math.ceil(41 / FP8_BLOCK[1]))
    assert torch.equal(decode(values, scales, FP8_BLOCK, torch.float32), slow_decode(values, scales))
    rounded = decode(values, scales, FP8_BLOCK, torch.bfloat16)
    assert torch.equal(rounded, slow_decode(values, scales).bfloat16())
    with pytest.raises(ShapeError, match=r"scales \[2, 3\] for values \[37, 41\], not \[3, 3\]"):
        decode(values, scales[:2], FP8_BLOCK, torch.float32)


def test_the_model_is_that_of_the_decoded_checkpoint_and_holds_no_decoded_matrix(base: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(decoded_checkpoint(base, tmp_path / "dense")).eval()
    model = load(base, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-4, atol=1e-4)
    stored = sum(tensor.nbytes for tensor in tensors_of(base).values() if tensor.dtype == torch.float8_e4m3fn)
    held = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float8_e4m3fn)
    assert held == stored
    in_layers = [module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    assert in_layers == []


def test_gradients_equal_the_decoded_models(base: Path, tmp_path: Path) -> None:
    """Of the additions in every layer, so through attention and experts of the layers above."""
    folder = decoded_checkpoint(base, tmp_path / "dense")
    gradients = []
    for source in (base, folder):
        model = load(source, dtype=torch.float32)
        model.attach_shared_expert(8)
        model.attach_router_delta()
        disturb(model)
        model.requires_grad_(False)
        for addition in additions(model):
            addition.requires_grad_(True)
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        learnt = [
            p for addition in additions(model) for p in addition.named_parameters() if not is_selection_bias(p[0])
        ]
        gradients.append([parameter.grad for _, parameter in learnt])
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_cast_leaves_values_and_scales_as_they_are(base: Path) -> None:
    model = load(base, dtype=torch.bfloat16)
    before = {name: p.view(torch.uint8).clone() for name, p in model.named_parameters() if "experts" in name}
    model.float().bfloat16()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter.view(torch.uint8), before[name]), name
    assert {type(module) for module in model.modules() if isinstance(module, Fp8Module)} == {Fp8Experts, Fp8Linear}


def test_converting_keeps_fp8_and_names_it(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    converted = checkpoint.family.hook.nexus_converted_config(config=checkpoint.config, width=8)
    assert "quantization_config" not in converted
    assert (converted["expert_storage"], converted["weight_block_size"]) == ("fp8", list(FP8_BLOCK))
    assert checkpoint.description.storage == "fp8"
    assert checkpoint.family.hook.nexus_describe_moe(config=converted).storage == "fp8"


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", torch.bfloat16, "up_proj.weight' is BF16, not F8_E4M3"),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", torch.bfloat16, "scale_inv' is BF16, not F32"),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", None, "missing tensors: .*o_proj.weight_scale_inv"),
        ("model.layers.2.mlp.experts.3.up_proj.weight_scale_inv", None, "missing tensors: .*up_proj.weight_scale_inv"),
    ],
)
def test_a_matrix_of_another_type_or_without_its_scales_is_refused_by_name(
    tmp_path: Path, name: str, dtype: torch.dtype | None, message: str
) -> None:
    folder = write_fp8_checkpoint(tmp_path / "base")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    if dtype is None:
        del tensors[name], index["weight_map"][name]
    else:
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(folder)
