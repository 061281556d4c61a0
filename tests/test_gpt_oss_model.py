"""The model: equal to the published architecture, with additions that can be switched off, and strict about files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_checkpoints import rewrite_tensors, write_tiny_checkpoint
from gpt_oss_reference import ReferenceGptOss
from nexus_gpt_oss.experts import PackedExperts
from nexus_gpt_oss.modeling import NexusGptOssForCausalLM
from nexus_gpt_oss.plugin import nexus_attach_router_delta, nexus_attach_shared_expert
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import nexus_core.auto  # noqa: F401 - registers the model with transformers
from nexus_core.additions import RouterDelta, SharedExpert, additions, as_teacher
from nexus_core.errors import CheckpointError, UsageError
from nexus_core.models import load

SLIDING_WINDOW = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "base")


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(11))


def randomize(module: nn.Module, std: float = 0.1) -> None:
    """Give every parameter of a module that training would move a value far from zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def converted(folder: Path, dtype: torch.dtype = torch.float32, *, trained: bool = True) -> Any:
    """The base with a shared expert of width 24 and router changes, both random if trained."""
    model = load(folder, dtype=dtype)
    assert nexus_attach_shared_expert(model, 24)
    assert nexus_attach_router_delta(model)
    if trained:
        for addition in additions(model):
            randomize(addition)
    return model


@pytest.mark.parametrize("layers_experts", [(2, 8, 2), (4, 32, 4)])
def test_logits_equal_the_published_architecture(tmp_path: Path, layers_experts: tuple[int, int, int]) -> None:
    layers, experts, top_k = layers_experts
    folder = write_tiny_checkpoint(tmp_path / "base", layers=layers, experts=experts, top_k=top_k, seed=3)
    ids = token_ids(SLIDING_WINDOW + 40)
    with torch.no_grad():
        logits = load(folder).float()(ids[None]).logits[0]
    expected = ReferenceGptOss(folder)(ids)
    assert (logits - expected).norm() / expected.norm() < 1e-5
    assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_start_changes_no_logit(base: Path, dtype: torch.dtype) -> None:
    ids = token_ids(2, SLIDING_WINDOW + 40)
    model = load(base, dtype=dtype)
    before = model(ids).logits
    nexus_attach_shared_expert(model, 24)
    assert torch.equal(model(ids).logits, before)
    nexus_attach_router_delta(model)
    assert torch.equal(model(ids).logits, before)
    assert len(additions(model)) == 4
    assert all(module.gate_proj.weight.abs().sum() > 0 for module in additions(model) if hasattr(module, "gate_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_is_the_base_to_the_bit(base: Path, dtype: torch.dtype) -> None:
    ids = token_ids(2, 50)
    model = converted(base, dtype)
    expected = load(base, dtype=dtype)(ids, output_router_logits=True)
    student = model(ids, output_router_logits=True)
    with as_teacher(model):
        teacher = model(ids, output_router_logits=True)
    assert torch.equal(teacher.logits, expected.logits)
    assert all(torch.equal(*pair) for pair in zip(teacher.router_logits, expected.router_logits, strict=True))
    assert not torch.equal(student.logits, expected.logits)
    assert not torch.equal(student.router_logits[0], expected.router_logits[0])


def test_a_router_change_of_zero_routes_to_the_bit_where_logits_are_close() -> None:
    # Close bfloat16 logits tie often, and softmax rounds differently in float32: both must not show.
    from nexus_gpt_oss.configuration import NexusGptOssConfig
    from nexus_gpt_oss.modeling import PackedRouter

    router = PackedRouter(NexusGptOssConfig(hidden_size=32, num_local_experts=32, num_experts_per_tok=4))
    randomize(router, std=0.02)
    router.bfloat16()
    hidden_TD = torch.randn((20000, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_TE, weights_TK, indices_TK = router(hidden_TD)
    changed_TE, changed_TK, changed_indices_TK = router(hidden_TD, torch.zeros(20000, 32))
    assert torch.equal(changed_TE, logits_TE.float())
    assert torch.equal(changed_indices_TK, indices_TK)
    assert torch.equal(changed_TK, weights_TK)


def test_router_logits_are_those_of_every_layer(base: Path) -> None:
    answer = load(base)(token_ids(2, 9), output_router_logits=True, output_hidden_states=True)
    assert [logits.shape for logits in answer.router_logits] == [(18, 8), (18, 8)]
    assert [states.shape for states in answer.hidden_states] == [(2, 9, 64)] * 3


def test_generation_with_a_cache_equals_recomputing_everything(base: Path) -> None:
    model = converted(base)
    prompt = token_ids(1, SLIDING_WINDOW + 3)
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = prompt
    for _ in range(6):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(dim=-1)), dim=-1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(base: Path, use_reentrant: bool) -> None:
    ids = token_ids(1, 30)
    gradients = []
    for checkpoints in (False, True):
        model = converted(base).train()
        model.requires_grad_(False)
        for addition in additions(model):
            addition.requires_grad_(True)
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * (6 + 2)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    # The first layer's additions learn through the frozen experts of the second.
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "layers.0" in name)


def test_casting_leaves_bytes_and_rotary_frequencies_alone(base: Path) -> None:
    model = load(base)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    experts = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(experts) == 8
    model.bfloat16().float().to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert all(torch.equal(model.get_parameter(name), packed) for name, packed in experts.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_and_loaded_in_another_process_it_is_the_same(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = converted(base, dtype)
    ids = token_ids(1, 20)
    model.save_pretrained(tmp_path / "converted")
    torch.save({"logits": model(ids).logits, "tensors": model.state_dict()}, tmp_path / "expected.pt")
    script = f"""
import torch
import nexus_core.auto
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "converted")!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert type(model).__name__ == "NexusGptOssForCausalLM"
tensors = model.state_dict()
assert tensors.keys() == expected["tensors"].keys()
for name, tensor in expected["tensors"].items():
    assert tensors[name].dtype == tensor.dtype, name
    assert torch.equal(tensors[name], tensor), name
assert torch.equal(model(torch.tensor({ids.tolist()})).logits, expected["logits"])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)
    saved = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert saved["model_type"] == "nexus_gpt_oss"
    assert saved["shared_expert_width"] == 24
    assert "quantization_config" not in saved


def test_router_changes_stay_float32_in_a_bfloat16_model(base: Path, tmp_path: Path) -> None:
    model = converted(base, torch.bfloat16)
    model.save_pretrained(tmp_path / "converted")
    loaded = load(tmp_path / "converted", dtype=torch.bfloat16)
    for module in additions(loaded):
        expected = torch.float32 if isinstance(module, RouterDelta) else torch.bfloat16
        assert {parameter.dtype for parameter in module.parameters()} == {expected}


def test_a_model_made_from_its_configuration_starts_at_its_base() -> None:
    config = AutoConfig.for_model(
        "nexus_gpt_oss",
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        shared_expert_width=8,
        has_router_delta=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, NexusGptOssForCausalLM)
    shared = model.model.layers[0].mlp.shared_expert
    assert isinstance(shared, SharedExpert)
    assert not shared.down_proj.weight.any()
    assert shared.up_proj.weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)
    ids = torch.arange(16)[None]
    with as_teacher(model):
        expected = model(ids).logits
    assert torch.equal(model(ids).logits, expected)


def test_no_dense_expert_is_ever_allocated(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("dense experts were built")

    monkeypatch.setattr(modeling_gpt_oss.GptOssExperts, "__init__", refuse)
    monkeypatch.setattr(modeling_gpt_oss.GptOssMLP, "__init__", refuse)
    model = converted(base)
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2


@pytest.mark.parametrize("part", ["experts.down_proj_scales", "shared_expert.up_proj.bias", "router_delta.weight"])
@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
def test_a_missing_tensor_is_refused_by_name(base: Path, tmp_path: Path, part: str, loader: Any) -> None:
    converted(base, torch.bfloat16).save_pretrained(tmp_path / "converted", max_shard_size="150KB")
    name = f"model.layers.1.mlp.{part}"
    rewrite_tensors(tmp_path / "converted", drop=name)
    with pytest.raises(CheckpointError, match=f"missing tensors: {name}"):
        loader(tmp_path / "converted")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.mlp.gate.weight", torch.zeros(2), "unknown tensors: model.layers.0.mlp.gate.weight"),
        ("model.layers.0.mlp.shared_expert.up_proj.bias", torch.zeros(2), "unknown tensors: .*shared_expert.up_proj"),
        ("model.layers.0.self_attn.sinks", torch.zeros(3), r"another shape: .*sinks \[3\], not \[4\]"),
    ],
)
def test_an_unknown_or_misshapen_tensor_is_refused_by_name(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "base")
    rewrite_tensors(folder, drop=name)
    rewrite_tensors(folder, add={name: tensor})
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_experts_stored_as_another_type_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "base")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    rewrite_tensors(folder, drop=name)
    rewrite_tensors(folder, add={name: torch.zeros((8, 64, 1), dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=f"not bytes .{name} I32, not U8"):
        load(folder)


@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
def test_whole_numbers_for_weights_are_refused_by_name(tmp_path: Path, loader: Any) -> None:
    folder, name = tmp_path / "model", "model.layers.0.mlp.router.weight"
    load(write_tiny_checkpoint(tmp_path / "base")).save_pretrained(folder, max_shard_size="150KB")
    rewrite_tensors(folder, drop=name)
    rewrite_tensors(folder, add={name: torch.ones((8, 64), dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"not of the model's kind of number .{name} I8, not bfloat16"):
        loader(folder)


def test_a_shard_that_is_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "base")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*truncated"):
        load(folder)


def test_loading_info_is_given_to_whoever_asks(base: Path) -> None:
    model, info = NexusGptOssForCausalLM.from_pretrained(base, output_loading_info=True)
    assert isinstance(model, NexusGptOssForCausalLM)
    assert not info["missing_keys"]


def test_a_second_shared_expert_and_a_width_of_zero_are_refused(base: Path) -> None:
    model = load(base)
    with pytest.raises(UsageError, match="width 0"):
        nexus_attach_shared_expert(model, 0)
    nexus_attach_shared_expert(model, 8)
    with pytest.raises(UsageError, match="already has shared experts, of width 8"):
        nexus_attach_shared_expert(model, 8)
    nexus_attach_router_delta(model)
    delta = model.model.layers[0].mlp.router_delta
    nexus_attach_router_delta(model)
    assert model.model.layers[0].mlp.router_delta is delta
