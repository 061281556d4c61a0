"""What is measured on the embedded model: held-out losses and how its routers use the experts."""

# B windows, S positions, T tokens, E experts

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GptOssForCausalLM


@dataclass(frozen=True)
class Loss:
    """Held-out negative log-likelihood of one data set."""

    nats_per_token: float
    nats_per_byte: float


@dataclass(frozen=True)
class Routing:
    """Use of one layer's experts over top-k slots: entropy relative to even use, least and most used share."""

    entropy: float
    least_share: float
    most_share: float


def windows(stream: Tensor, length: int, most: int) -> Tensor:
    """The stream in neighbouring windows (B, S + 1), every window's last token the next one's first."""
    count = min(most, (len(stream) - 1) // length)
    return torch.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)])


def learnable_nats_per_byte(texts: Iterable[str]) -> float:
    """What LZMA needs for the texts, knowing nothing before them: how much can be learnt from them alone.

    A set the base knows needs fewer nats by the base than by this; one it does not know needs more.
    """
    data = "\n".join(texts).encode()
    return len(lzma.compress(data, preset=9)) * 8 * math.log(2) / len(data)


@torch.no_grad()
def held_out_loss(model: GptOssForCausalLM, windows_BS: Tensor, byte_lengths: tuple[int, ...]) -> Loss:
    """Mean over all predicted tokens; special tokens count as tokens of no bytes."""
    nats = 0.0
    for batch_BS in windows_BS.split(8):
        logits = model(batch_BS[:, :-1], use_cache=False).logits
        nats += F.cross_entropy(logits.flatten(0, 1), batch_BS[:, 1:].flatten(), reduction="sum").item()
    targets_BS = windows_BS[:, 1:]
    bytes_read = int(torch.tensor(byte_lengths)[targets_BS].sum())
    return Loss(nats / targets_BS.numel(), nats / bytes_read)


@torch.no_grad()
def routing(model: GptOssForCausalLM, windows_BS: Tensor) -> list[Routing]:
    """Use of the experts per layer over the given windows."""
    top_k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    counts_LE = torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.float64)
    for batch_BS in windows_BS.split(8):
        output = model(batch_BS[:, :-1], output_router_logits=True, use_cache=False)
        for layer, logits_TE in enumerate(output.router_logits):
            counts_LE[layer] += torch.bincount(logits_TE.topk(top_k, dim=-1).indices.flatten(), minlength=experts)
    shares_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
    entropy_L = -torch.special.xlogy(shares_LE, shares_LE).sum(-1) / math.log(experts)
    return [
        Routing(entropy.item(), shares_E.min().item(), shares_E.max().item())
        for entropy, shares_E in zip(entropy_L, shares_LE, strict=True)
    ]
