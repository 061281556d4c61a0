"""Attention with sinks, forward and gradients, over long sequences: against transformers' eager attention."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from nexus_gpt_oss.attention import blocks
from nexus_gpt_oss.attention.visibility import Visibility
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from benchmarks.backends import clock_for
from benchmarks.measurement import AnonymousMemory, Measurement, interleaved

# A sixteenth of a gpt-oss layer's heads: eager attention over 8,192 tokens takes 3 GB for these already.
QUERY_HEADS, KEY_HEADS, HEAD_WIDTH, WINDOW = 4, 1, 64, 128
LENGTHS = (2048, 4096, 8192)


def run() -> list[Measurement]:
    """Time and peak memory relative to eager attention, in bfloat16, for a full and a sliding layer."""
    return [measurement for length in LENGTHS for measurement in _at(length)]


def _at(length: int) -> list[Measurement]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, heads, length, HEAD_WIDTH), generator=generator).bfloat16().requires_grad_()
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    )
    sinks = torch.zeros(QUERY_HEADS, dtype=torch.bfloat16)
    scaling = HEAD_WIDTH**-0.5
    module = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KEY_HEADS, sinks=sinks, training=True)

    def eager() -> None:
        mask = torch.full((length, length), -torch.inf, dtype=torch.bfloat16).triu_(1)[None, None]
        output, _ = eager_attention_forward(module, query, key, value, mask, scaling)
        torch.autograd.grad(output.float().sum(), (query, key, value))

    def ours(window: int | None) -> Callable[[], None]:
        def run() -> None:
            output = blocks.attend(query, key, value, sinks, Visibility(None, window), scaling)
            torch.autograd.grad(output.float().sum(), (query, key, value))

        return run

    subjects = {"eager (transformers)": eager, "nexus, full": ours(None), "nexus, window of 128": ours(WINDOW)}
    seconds = interleaved(subjects, rounds=3, clock=clock_for(torch.device("cpu")))
    memory = {}
    for name, subject in subjects.items():
        with AnonymousMemory() as used:
            subject()
        memory[name] = used.peak_bytes
    against = "eager (transformers)"
    return [
        Measurement(
            f"attention, forward and gradients, {length} tokens, {QUERY_HEADS} heads",
            name,
            seconds[name],
            seconds[name] / seconds[against],
            against,
            f"{memory[name] / 1e6:,.0f} MB, {memory[name] / memory[against]:.3f} x",
        )
        for name in subjects
    ]
