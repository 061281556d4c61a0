"""Completions of prompts: drawn from the model's own distribution, together as each alone, with a cache as without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from family_checkpoints import write_family_checkpoint
from gpt_oss_checkpoints import write_tiny_checkpoint

import nexus_core
from nexus_core.stages.completions import Writing, complete, draw


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base") / "model"
    return nexus_core.load(write_tiny_checkpoint(folder, vocabulary=320), dtype=torch.float32)


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    chances = (torch.arange(1000).double() + 0.5) / 1000
    drawn = draw(probabilities.log().expand(1000, -1), chances, temperature=1.0)
    assert torch.bincount(drawn, minlength=5).tolist() == [500, 0, 300, 200, 0]
    edges = torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)
    assert draw(probabilities.log().expand(2, -1), edges, temperature=1.0).tolist() == [0, 3]


def test_temperature_and_top_p_do_what_they_say() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1000, -1)
    chances = (torch.arange(1000).double() + 0.5) / 1000
    squared = np.array([25, 9, 4]) / 38
    halved = torch.bincount(draw(logits, chances, temperature=0.5), minlength=3)
    np.testing.assert_allclose(halved / 1000, squared, atol=1e-3)
    assert torch.bincount(draw(logits, chances, 1.0, top_p=0.7), minlength=3).tolist() == [625, 375, 0]
    assert set(draw(logits, chances, 1.0, top_p=0.5).tolist()) == {0}


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 262, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_different_lengths_are_completed_together_as_each_alone(model, temperature) -> None:
    # The sliding window is 128 tokens.
    prompts, writing = prompts_of(3, 40, 150, 127), Writing([2], 20, temperature, seed=5)
    together = complete(model, prompts, range(4), writing)
    alone = [complete(model, [prompt], [number], writing)[0] for number, prompt in enumerate(prompts)]
    assert together == alone
    assert len({tuple(completion) for completion in together}) == 4


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_other_families_complete_prompts_together_as_each_alone(family, tmp_path) -> None:
    other = nexus_core.load(write_family_checkpoint(tmp_path / family, family), dtype=torch.float32)
    prompts, writing = prompts_of(3, 40, 17), Writing([319], 8, seed=1)
    together = complete(other, prompts, range(3), writing)
    assert together == [complete(other, [prompt], [row], writing)[0] for row, prompt in enumerate(prompts)]


def test_it_writes_what_whole_passes_without_a_cache_would(model) -> None:
    prompt = prompts_of(120)[0]
    writing = Writing([2], 16, 0.8, 0.9, seed=3)
    tokens = list(prompt)
    for chance in writing.chances(7):
        with torch.no_grad():
            positions = torch.arange(len(tokens))[None]
            logits = model(input_ids=torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[:, -1]
        tokens.append(int(draw(logits, torch.tensor([chance]), 0.8, 0.9)))
        if tokens[-1] == 2:
            break
    assert complete(model, [prompt], [7], writing)[0] == tokens[len(prompt) :]


def test_a_completion_ends_with_its_first_end_token(model) -> None:
    prompt = prompts_of(30)[0]
    free = complete(model, [prompt], [0], Writing([319], 12))[0]
    assert len(free) == 12
    ended = complete(model, [prompt, *prompts_of(50)], [0, 1], Writing([free[4], 319], 12))
    assert ended[0] == free[: free.index(free[4]) + 1]


def test_a_checkpoints_own_generation_settings_are_not_used(model) -> None:
    prompt, writing = prompts_of(30)[0], Writing([2], 12)
    expected = complete(model, [prompt], [0], writing)
    brought = model.generation_config
    model.generation_config = type(brought)(repetition_penalty=50.0, top_k=1, min_new_tokens=3, eos_token_id=5)
    try:
        assert complete(model, [prompt], [0], writing) == expected
        assert model.generation_config.repetition_penalty == 50.0
    finally:
        model.generation_config = brought
