"""Packed documents are kept apart where the model can, and that is tried on the model itself."""

from __future__ import annotations

import pytest
import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from torch import nn
from transformers import GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import nexus_core
from nexus_core.data.isolation import isolates_documents, position_arguments


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    return nexus_core.load(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocabulary=64), dtype=torch.float32)


def alone_and_packed(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of documents on their own, and of the same ones in one sequence with their positions; some longer than a
    sliding window.
    """
    documents = [torch.arange(length) % 50 for length in (7, 30, 1, 160, 12)]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=document[None]).logits[0] for document in documents])
        arguments = position_arguments(True, positions)
        packed = model(input_ids=torch.cat(documents)[None], use_cache=False, **arguments).logits[0]
    return alone, packed


def test_gpt_oss_reads_a_packed_document_as_if_it_were_alone(gpt_oss):
    assert isolates_documents(gpt_oss)
    alone, packed = alone_and_packed(gpt_oss)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_families_do_so_by_themselves(attention):
    config = Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=64,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation=attention).eval()
    assert isolates_documents(model)
    alone, packed = alone_and_packed(model)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_model_that_only_numbers_the_tokens_anew_is_found_out(gpt_oss):
    # transformers' own GPT-OSS takes the positions but builds its masks without them.
    config = gpt_oss.config.to_dict()
    config.pop("model_type")
    stock = GptOssForCausalLM(GptOssForCausalLM.config_class(**config)).eval()
    assert not isolates_documents(stock)
    assert position_arguments(False, torch.zeros(1, 3)) == {}


def test_a_model_without_positions_is_left_alone():
    class Decoder(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> None:
            raise AssertionError("not to be called")

    class Model(nn.Module):
        base_model = Decoder()

    assert not isolates_documents(Model())
