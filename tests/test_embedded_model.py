"""The embedded checkpoint is a small but real GPT-OSS, and its data sets are what the base has not seen."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import nexus_gpt_oss.embedded
import pytest
import torch
from nexus_gpt_oss.embedded import figures, make, tokenizer
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel

import nexus_core

EMBEDDED = Path(nexus_gpt_oss.embedded.__file__).parent
MODEL = EMBEDDED / "tiny-gpt-oss"
SETS = ("prose", "code", "arithmetic")
MEGABYTE = 10**6


def records(name: str) -> list[dict[str, str]]:
    lines = (EMBEDDED / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(name: str) -> list[str]:
    """The texts of a set as the model reads them: exchanges in its own turn format."""
    return [
        record["text"] if "text" in record else tokenizer.chat(own_tokenizer(), record["prompt"], record["response"])
        for record in records(name)
    ]


@cache
def own_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@cache
def config() -> dict[str, Any]:
    return json.loads((MODEL / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return nexus_core.load("embedded:tiny-gpt-oss").float()


@pytest.fixture(scope="module")
def windows() -> dict[str, torch.Tensor]:
    """Sixteen windows (B, S + 1) of each set, spread evenly: neighbours are often of one subject."""
    of_all = {name: figures.windows(make.stream(own_tokenizer(), words(name)), length=256, most=10**6) for name in SETS}
    return {name: all_BS[:: len(all_BS) // 16][:16] for name, all_BS in of_all.items()}


def expected_tensors() -> dict[str, tuple[str, list[int]]]:
    """Type and shape under every name of the official layout, from config.json's numbers."""
    c = config()
    hidden, width, experts, vocabulary = (
        c[key] for key in ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size")
    )
    queries, keys = (c[key] * c["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm.weight": ("BF16", [hidden]),
        "post_attention_layernorm.weight": ("BF16", [hidden]),
        "self_attn.q_proj.weight": ("BF16", [queries, hidden]),
        "self_attn.q_proj.bias": ("BF16", [queries]),
        "self_attn.k_proj.weight": ("BF16", [keys, hidden]),
        "self_attn.k_proj.bias": ("BF16", [keys]),
        "self_attn.v_proj.weight": ("BF16", [keys, hidden]),
        "self_attn.v_proj.bias": ("BF16", [keys]),
        "self_attn.o_proj.weight": ("BF16", [hidden, queries]),
        "self_attn.o_proj.bias": ("BF16", [hidden]),
        "self_attn.sinks": ("BF16", [c["num_attention_heads"]]),
        "mlp.router.weight": ("BF16", [experts, hidden]),
        "mlp.router.bias": ("BF16", [experts]),
        "mlp.experts.gate_up_proj_blocks": ("U8", [experts, 2 * width, hidden // 32, 16]),
        "mlp.experts.gate_up_proj_scales": ("U8", [experts, 2 * width, hidden // 32]),
        "mlp.experts.gate_up_proj_bias": ("BF16", [experts, 2 * width]),
        "mlp.experts.down_proj_blocks": ("U8", [experts, hidden, width // 32, 16]),
        "mlp.experts.down_proj_scales": ("U8", [experts, hidden, width // 32]),
        "mlp.experts.down_proj_bias": ("BF16", [experts, hidden]),
    }
    return {
        "model.embed_tokens.weight": ("BF16", [vocabulary, hidden]),
        "lm_head.weight": ("BF16", [vocabulary, hidden]),
        "model.norm.weight": ("BF16", [hidden]),
        **{f"model.layers.{n}.{name}": kind for n in range(c["num_hidden_layers"]) for name, kind in layer.items()},
    }


def test_the_checkpoint_folder_is_at_most_four_megabytes_and_the_data_one_and_a_half() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*")) <= 4 * MEGABYTE
    assert sum(file.stat().st_size for file in (EMBEDDED / "data").rglob("*")) <= 1.5 * MEGABYTE


def test_tensors_have_the_official_names_types_and_shapes_in_two_indexed_shards() -> None:
    index = json.loads((MODEL / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found, total_bytes = {}, 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(MODEL / file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name, place in index["weight_map"].items() if place == file}
            for name in shard.keys():  # noqa: SIM118 (a safetensors file is no dictionary)
                tensor = shard.get_slice(name)
                found[name] = (tensor.get_dtype(), tensor.get_shape())
                total_bytes += shard.get_tensor(name).nbytes
    assert found == expected_tensors()
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == total_bytes


def test_config_reads_like_the_official_one() -> None:
    assert config()["architectures"] == ["GptOssForCausalLM"]
    assert config()["model_type"] == "gpt_oss"
    assert config()["quantization_config"] == {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
    assert config()["rope_scaling"] == {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    assert config()["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert (config()["num_local_experts"], config()["num_experts_per_tok"]) == (32, 4)


@pytest.mark.parametrize("name", SETS)
def test_tokenizer_gives_back_every_held_out_text(name: str) -> None:
    for text in words(name)[:200]:
        assert own_tokenizer().decode(own_tokenizer().encode(text)) == text


def test_tokenizer_gives_back_text_it_was_not_trained_on() -> None:
    for text in ("", "  two  spaces\n\n\tand a tab ", "Grüße, 世界 🙂 naïve ﬁ", "\x00\x7f", "12345 <|end|> ."):
        assert own_tokenizer().decode(own_tokenizer().encode(text)) == text


def test_special_tokens_end_the_vocabulary_and_are_the_config_s() -> None:
    ids = own_tokenizer().convert_tokens_to_ids(list(tokenizer.SPECIAL_TOKENS))
    assert ids == list(range(config()["vocab_size"] - len(ids), config()["vocab_size"]))
    assert own_tokenizer().eos_token_id == config()["eos_token_id"]
    assert own_tokenizer().pad_token_id == config()["pad_token_id"]


def test_chat_template_writes_harmony_turns() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    asked = own_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    opening = (
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>1 + 1?<|end|><|start|>assistant<|message|>"
    )
    assert asked == opening
    answered = own_tokenizer().apply_chat_template([*turns, {"role": "assistant", "content": "2"}], tokenize=False)
    assert answered == f"{opening}2<|return|>"


@pytest.mark.parametrize("name", ["prose", "code"])
def test_texts_are_of_500_to_3000_characters_and_unique(name: str) -> None:
    texts = [record["text"] for record in records(name)]
    assert all(500 <= len(text) <= 3000 for text in texts)
    assert len(set(texts)) == len(texts) > 100


def test_word_problems_are_unique_and_none_was_trained_on() -> None:
    known, held_out = make.write_arithmetic()
    prompts = [record["prompt"] for record in records("arithmetic")]
    assert prompts == [problem.prompt for problem in held_out]
    assert len(set(prompts)) == len(prompts) == make.HELD_OUT_PROBLEMS
    assert not {problem.prompt for problem in known} & set(prompts)


def test_every_equation_in_the_worked_answers_is_right() -> None:
    equations = 0
    for record in records("arithmetic"):
        for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", record["response"]):
            assert eval(left) == int(right), record
            equations += 1
        assert re.search(r"\d+\.?$", record["response"]), record
    assert equations > len(records("arithmetic"))


def test_no_expert_is_dead_and_use_is_uneven_but_not_collapsed(
    model: PreTrainedModel, windows: dict[str, torch.Tensor]
) -> None:
    for layer in figures.routing(model, torch.cat([windows[name] for name in SETS])):
        # Even use of 32 experts would be 0.031; over all held-out text the least used one gets 0.012.
        assert layer.least_share >= 0.003
        assert layer.most_share <= 0.10
        assert 0.90 <= layer.entropy <= 0.995


def test_the_base_knows_prose_best_and_arithmetic_poorly(
    model: PreTrainedModel, windows: dict[str, torch.Tensor]
) -> None:
    lengths = tokenizer.byte_lengths(own_tokenizer())
    nats_per_byte = {name: figures.held_out_loss(model, windows[name], lengths).nats_per_byte for name in SETS}
    relative = {
        name: nats_per_byte[name] / figures.learnable_nats_per_byte("\n".join(r.values()) for r in records(name))
        for name in SETS
    }
    assert nats_per_byte["arithmetic"] > 1.2 * max(nats_per_byte["prose"], nats_per_byte["code"])
    assert relative["prose"] < 1
    assert relative["prose"] < relative["code"] < relative["arithmetic"] / 1.5
