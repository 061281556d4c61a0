"""What a model writes after prompts, several at once, the same for the same seed however the work is divided.

# B prompts, P longest of them in tokens, V vocabulary, M tokens written at most
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True)
class Writing:
    """How completions are written. ends: tokens that end one. temperature: 0 always takes the likeliest token."""

    ends: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def chances(self, number: int) -> np.ndarray:
        """The random numbers (M,), from 0 to 1, that completion `number` of a whole job is drawn with.

        A completion has its own, so that it does not depend on which others are written beside it.
        """
        return np.random.default_rng([self.seed, number]).random(self.max_new_tokens)


@torch.inference_mode()
def complete(model: Any, prompts: Sequence[Sequence[int]], numbers: Sequence[int], writing: Writing) -> list[list[int]]:
    """What the model writes after each prompt, its end token included; without one if it was cut at the limit.

    numbers: of each completion in the whole job. The generation settings that a checkpoint brings along (penalties,
    its own sampling) are not used: they would be another distribution than the model's.
    """
    longest = max(len(prompt) for prompt in prompts)
    # Shorter prompts are padded on the left, so that what is written stands behind all of them; any token will do.
    padding = writing.ends[0]
    input_ids_BP = torch.full((len(prompts), longest), padding)
    is_prompt_BP = torch.zeros_like(input_ids_BP)
    for row, prompt in enumerate(prompts):
        input_ids_BP[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        is_prompt_BP[row, longest - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if writing.temperature > 0:
        chances_BM = np.stack([writing.chances(number) for number in numbers])
        processors.append(_Draw(torch.from_numpy(chances_BM).to(model.device), longest, writing))
    with _own_generation_settings(model):
        written = model.generate(
            input_ids=input_ids_BP.to(model.device),
            attention_mask=is_prompt_BP.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=writing.max_new_tokens,
                do_sample=False,
                eos_token_id=list(writing.ends),
                pad_token_id=padding,
            ),
            logits_processor=processors,
        )
    return [_up_to_its_end(row, writing.ends) for row in written[:, longest:].tolist()]


def draw(logits_BV: torch.Tensor, chances_B: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """Tokens (B,) drawn from softmax(logits / temperature), each with the one random number from 0 to 1 it is given.

    top_p: only from the likeliest tokens that together have at least this probability. Source: Holtzman et al. 2020,
    arXiv 1904.09751.
    """
    # In float64: summed over 200,000 tokens, float32 would miss the unlikely ones.
    probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).double()
    if top_p < 1.0:
        ordered_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter(-1, ids_BV, ordered_BV * (before_BV < top_p))
    up_to_BV = probabilities_BV.cumsum(-1)
    total_B1 = up_to_BV[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(up_to_BV, chances_B[:, None] * total_B1, right=True)
    # Rounding may give the whole sum, behind the last token that is possible at all.
    last_B1 = torch.searchsorted(up_to_BV, total_B1)
    return torch.minimum(drawn_B1, last_B1).squeeze(-1)


class _Draw(LogitsProcessor):
    """Leaves one token possible, the one that is drawn."""

    def __init__(self, chances_BM: torch.Tensor, prompt_tokens: int, writing: Writing):
        self.chances_BM, self.prompt_tokens, self.writing = chances_BM, prompt_tokens, writing

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        place = input_ids.shape[1] - self.prompt_tokens
        drawn_B = draw(scores, self.chances_BM[:, place], self.writing.temperature, self.writing.top_p)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(-1, drawn_B[:, None], 0.0)  # type: ignore[return-value]


@contextmanager
def _own_generation_settings(model: Any) -> Iterator[None]:
    """Inside, what the checkpoint says about generation does not fill in what is not said here."""
    brought = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = brought


def _up_to_its_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
