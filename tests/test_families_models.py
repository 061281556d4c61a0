"""Extended models: the base's own numbers, and everything transformers' models can do."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import CONFIGS, VOCABULARY, write_family_checkpoint
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nexus_core.additions import SharedExpert, additions, as_teacher, router_tensors
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.contract import disturb
from nexus_core.errors import UsageError
from nexus_core.models import load
from nexus_core.plugins import installed

TOKENS = torch.arange(2, 42).reshape(2, 20) * 7 % VOCABULARY


@pytest.fixture(scope="module", params=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp(request.param) / "base", request.param)


def extended(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = load(base, dtype=dtype)
    model.attach_shared_expert(8)
    model.attach_router_delta()
    disturb(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_gives_the_logits_of_transformers_own_class(base: Path, dtype: torch.dtype) -> None:
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    model = load(base, dtype=dtype)
    assert torch.equal(logits(model), logits(stock))
    # Neither of the two falls back to the slow loop over experts.
    assert model.config._experts_implementation == stock.config._experts_implementation == "grouped_mm"


def test_the_shared_expert_and_the_changed_router_are_computed_as_the_obvious_formula_says(base: Path) -> None:
    """The block's output against one computed expert by expert from the checkpoint's own numbers."""
    checkpoint, model = open_checkpoint(base), extended(base)
    hook, moe = checkpoint.family.hook, checkpoint.description
    found = hook.nexus_moe_blocks(model=model)[0]
    hidden = torch.randn(5, moe.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = found.block(hidden[None])[0]
        with as_teacher(model):
            before = found.block(hidden[None])[0]
            plain = found.router(hidden)
    delta, shared = found.router.router_delta, found.block.nexus_shared_expert
    logits_TE = hidden @ found.router.weight.T + hidden @ delta.weight.T + delta.bias
    tensors = router_tensors(found.router) | {"nexus_selection_bias": delta.selection_bias}
    weights, indices = hook.nexus_gate_weights(config=checkpoint.config, logits=logits_TE, router=tensors)

    def routed(weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        summed = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for weight, expert in zip(weights[token], indices[token].tolist(), strict=True):
                own = hook.nexus_read_expert(
                    reader=checkpoint.reader, config=checkpoint.config, layer=found.layer, expert=expert,
                    dtype=torch.float32,
                )  # fmt: skip
                neurons = functional.silu(own.gate @ hidden[token]) * (own.up @ hidden[token])
                summed[token] += weight * (own.down @ neurons)
        return summed

    added = (functional.silu(hidden @ shared.gate_proj.weight.T) * (hidden @ shared.up_proj.weight.T)) @ (
        shared.down_proj.weight.T
    )
    # What the base has beside its routed experts, such as a shared expert of its own, is in both outputs.
    own_output = before - routed(plain[1], plain[2])
    expected = routed(weights, indices) + own_output + added
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_generation_and_its_cache_go_through_the_additions(base: Path) -> None:
    model = extended(base)
    generated = model.generate(TOKENS[:1, :6], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = TOKENS[:1, :6]
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens)


def test_a_cast_rounds_no_frequency_no_selection_bias_and_no_router_change(base: Path) -> None:
    model = extended(base, torch.bfloat16)
    expected = logits(model)
    model.float().bfloat16()
    assert torch.equal(logits(model), expected)
    names = ("inv_freq", "correction_bias", "router_delta")
    tensors = [*model.named_buffers(), *model.named_parameters()]
    assert {t.dtype for name, t in tensors if any(part in name for part in names)} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_with_gradient_checkpointing(base: Path, use_reentrant: bool) -> None:
    gradients = []
    for checkpoints in (False, True):
        model = extended(base)
        model.requires_grad_(False)
        for addition in additions(model):
            addition.requires_grad_(True)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
            model.train()
        model(TOKENS, use_cache=False).logits.float().square().mean().backward()
        gradients.append([p.grad for addition in additions(model) for p in addition.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_copies_and_pickles_are_the_model(base: Path) -> None:
    model = extended(base)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        with as_teacher(other):
            assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


def test_a_process_that_never_loaded_the_family_unpickles_it(tmp_path: Path) -> None:
    base = write_family_checkpoint(tmp_path / "base", "qwen3_moe")
    model = extended(base)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    script = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "tokens = torch.arange(2, 42).reshape(2, 20) * 7 % model.config.vocab_size\n"
        "with torch.no_grad(): print(type(model).__name__, float(model(tokens, use_cache=False).logits.sum()))\n"
    )
    run = [sys.executable, "-c", script, str(tmp_path / "model.pickle")]
    found = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert found[0] == "NexusQwen3MoeForCausalLM"
    assert float(found[1]) == float(logits(model).sum())


def test_the_decoder_alone_loads_too(base: Path, tmp_path: Path) -> None:
    model = extended(base)
    model.save_pretrained(tmp_path / "extended")
    decoder = AutoModel.from_pretrained(tmp_path / "extended", dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = decoder(TOKENS, use_cache=False).last_hidden_state
        assert torch.equal(hidden, model.model(TOKENS, use_cache=False).last_hidden_state)
    assert len(additions(decoder)) == len(additions(model))


def test_casting_the_whole_model_leaves_a_router_change_in_float32_where_it_was_loaded(
    base: Path, tmp_path: Path
) -> None:
    extended(base).save_pretrained(tmp_path / "extended")
    model = load(tmp_path / "extended", dtype=torch.bfloat16)
    kinds = {type(addition).__name__: next(addition.parameters()).dtype for addition in additions(model)}
    assert kinds == {"SharedExpert": torch.bfloat16, "RouterDelta": torch.float32}
    assert model.float().dtype == torch.float32
    assert logits(model).dtype == torch.float32


def test_a_native_shared_expert_stays_beside_the_added_one(tmp_path: Path) -> None:
    base = write_family_checkpoint(tmp_path / "base", "qwen2_moe")
    model = extended(base)
    block = model.moe_blocks()[0].block
    assert type(block.shared_expert).__name__ == "Qwen2MoeMLP"
    assert isinstance(block.nexus_shared_expert, SharedExpert)
    assert block.shared_expert.up_proj.weight.shape == (24, 32)
    assert block.nexus_shared_expert.up_proj.weight.shape == (8, 32)


def test_additions_follow_the_model_and_are_refused_where_they_make_no_sense(base: Path) -> None:
    model = load(base, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="width 0"):
        model.attach_shared_expert(0)
    model.attach_shared_expert(4)
    assert {p.dtype for addition in additions(model) for p in addition.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="already has shared experts, of width 4"):
        model.attach_shared_expert(4)
    stock = AutoModelForCausalLM.from_pretrained(base)
    hook = open_checkpoint(base).family.hook
    with pytest.raises(UsageError, match=r"has no room for a shared expert; load the model with nexus_core\.load"):
        hook.nexus_attach_shared_expert(model=stock, width=4)


def test_registering_twice_is_harmless_and_knows_the_type() -> None:
    for _ in range(2):
        installed().hook.nexus_register_auto()
    for model_type in CONFIGS:
        config = AutoConfig.for_model(f"nexus_{model_type}")
        assert (config.shared_expert_width, config.has_router_delta) == (0, False)
