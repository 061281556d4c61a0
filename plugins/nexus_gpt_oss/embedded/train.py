"""Training of the embedded model: language-model loss, balanced routing, MXFP4 rounding of the experts at the end."""

# B sequences, S positions, T tokens, E experts, V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from nexus_gpt_oss import mxfp4
from nexus_gpt_oss.embedded import attention


@dataclass(frozen=True)
class Plan:
    """Length, mixture and rates of the training; `mixture` is each source's share of the sequences."""

    mixture: dict[str, float]
    steps: int = 2200
    batch_size: int = 8
    sequence_length: int = 256
    peak_learning_rate: float = 3e-3
    final_learning_rate_ratio: float = 0.02
    warmup_steps: int = 120
    weight_decay: float = 0.05
    # Large enough that no expert dies, small enough that experts still differ in use.
    balance_weight: float = 0.01
    rounded_share: float = 1 / 3
    gradient_norm: float = 1.0
    steps_per_report: int = 50
    seed: int = 20


def tiny_config(vocabulary: int, token_ids: dict[str, int]) -> GptOssConfig:
    """gpt-oss-20b's configuration with everything countable made small; H and I stay multiples of 32."""
    return GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_local_experts=32,
        num_experts_per_tok=4,
        head_dim=32,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        # 0.02 suits a width of 2880; at 128 it starves the first few hundred steps.
        initializer_range=0.05,
        bos_token_id=token_ids["<|startoftext|>"],
        eos_token_id=token_ids["<|return|>"],
        pad_token_id=token_ids["<|endoftext|>"],
        tie_word_embeddings=False,
    )


def train(
    config: GptOssConfig, streams: dict[str, Tensor], plan: Plan, say: Callable[[str], None]
) -> GptOssForCausalLM:
    """A float32 model trained on token streams, one per name in the plan's mixture, drawn at random offsets."""
    torch.manual_seed(plan.seed)
    model = GptOssForCausalLM._from_config(
        config, attn_implementation=attention.NAME, experts_implementation="grouped_mm"
    )
    generator = torch.Generator().manual_seed(plan.seed)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "bias" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "bias" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=plan.peak_learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    first_rounded = round(plan.steps * (1 - plan.rounded_share))
    began = time.monotonic()
    losses: list[float] = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        batch_BS = draw_batch(streams, plan, generator)
        with rounded_experts(model, enabled=step >= first_rounded):
            nll, balance = losses_of(model, batch_BS)
            (nll + plan.balance_weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(nll.item())
        if (step + 1) % plan.steps_per_report == 0:
            say(_report(step + 1, plan, losses, balance.item(), time.monotonic() - began))
    return model.eval()


def learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then a half cosine down to the final ratio of the peak."""
    if step < plan.warmup_steps:
        return plan.peak_learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return plan.peak_learning_rate * (plan.final_learning_rate_ratio + (1 - plan.final_learning_rate_ratio) * cosine)


def draw_batch(streams: dict[str, Tensor], plan: Plan, generator: torch.Generator) -> Tensor:
    """Token ids (B, S + 1): a source per sequence by the mixture, then a window of its stream."""
    names = sorted(plan.mixture)
    shares = torch.tensor([plan.mixture[name] for name in names])
    chosen = torch.multinomial(shares, plan.batch_size, replacement=True, generator=generator)
    windows = []
    for index in chosen.tolist():
        stream = streams[names[index]]
        last = len(stream) - plan.sequence_length - 1
        start = int(torch.randint(last + 1, (1,), generator=generator))
        windows.append(stream[start : start + plan.sequence_length + 1])
    return torch.stack(windows)


def losses_of(model: GptOssForCausalLM, batch_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood in nats per token, and the balance loss averaged over layers."""
    # The loss transformers adds for output_router_logits mixes all layers, which lets one layer collapse unseen.
    output = model.model(batch_BS[:, :-1], output_router_logits=True, use_cache=False)
    logits_TV = model.lm_head(output.last_hidden_state).flatten(0, 1)
    nll = F.cross_entropy(logits_TV, batch_BS[:, 1:].flatten())
    top_k = model.config.num_experts_per_tok
    balance = torch.stack([balance_loss(logits_TE, top_k) for logits_TE in output.router_logits]).mean()
    return nll, balance


def balance_loss(logits_TE: Tensor, top_k: int) -> Tensor:
    """1 where use and probability are even over the experts, more where they are not. Source: Fedus et al. 2021."""
    experts = logits_TE.shape[-1]
    chosen = logits_TE.topk(top_k, dim=-1).indices.flatten()
    use_E = torch.bincount(chosen, minlength=experts) / chosen.numel()
    return experts * (use_E * logits_TE.softmax(-1).mean(0)).sum()


@contextmanager
def rounded_experts(model: GptOssForCausalLM, enabled: bool = True) -> Iterator[None]:
    """Expert matrices stand at their MXFP4 values inside; gradients meet the unrounded ones (straight through)."""
    if not enabled:
        yield
        return
    matrices = [
        p for layer in model.model.layers for p in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
    ]
    kept = [parameter.data for parameter in matrices]
    for parameter in matrices:
        # Groups of 32 run along the input of each product, which transformers keeps as the second to last dimension.
        rows = parameter.data.transpose(-1, -2).contiguous()
        rounded = mxfp4.decode(*mxfp4.encode(rows), dtype=rows.dtype)
        parameter.data = rounded.transpose(-1, -2).contiguous()
    try:
        yield
    finally:
        for parameter, data in zip(matrices, kept, strict=True):
            parameter.data = data


def _report(done: int, plan: Plan, losses: list[float], balance: float, seconds: float) -> str:
    recent = sum(losses[-plan.steps_per_report :]) / plan.steps_per_report
    tokens_per_second = done * plan.batch_size * plan.sequence_length / seconds
    minutes_left = (plan.steps - done) * seconds / done / 60
    return (
        f"step {done}/{plan.steps}  loss {recent:.3f} nats/token  balance {balance:.3f}  "
        f"{tokens_per_second:,.0f} tokens/s  {minutes_left:.1f} min left"
    )
