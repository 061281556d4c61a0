"""Random models of real shapes: built on a device and written to disk they are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from nexus_gpt_oss import synthetic

from nexus_core.data.tokenizers import load_tokenizer
from nexus_core.models import load


def test_a_built_model_is_the_written_one(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "tiny", synthetic.config("tiny"), seed=3, tokenizer=True)
    written, built = load(tmp_path / "tiny", dtype=torch.bfloat16), synthetic.build("tiny", seed=3)
    expected, found = written.state_dict(), built.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    buffers = dict(built.named_buffers())
    for name, buffer in written.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in built.parameters())
    input_ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = built(input_ids=input_ids).logits
        assert torch.equal(logits, written(input_ids=input_ids).logits)
    assert logits.isfinite().all()


def test_other_seeds_and_layers_give_other_models() -> None:
    one, other = synthetic.build("tiny", 1, seed=0), synthetic.build("tiny", 1, seed=1)
    assert one.config.num_hidden_layers == 1
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_the_tokenizer_knows_fewer_tokens_than_the_model(tmp_path: Path) -> None:
    config = synthetic.config("tiny")
    synthetic.write(tmp_path / "tiny", config, tokenizer=True)
    assert len(load_tokenizer(tmp_path / "tiny")) <= config["vocab_size"]
