"""The output head as the losses use it: frozen, applied to a few tokens at a time.

# T tokens, D hidden size, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class OutputHead:
    """logits (T, V) = scale * (hidden (T, D) @ weight (V, D).T + bias (V,)); nothing of it learns."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def vocabulary_size(self) -> int:
        return self.weight.shape[0]

    def on(self, device: torch.device) -> OutputHead:
        """The head with its numbers on a device; itself if they are there."""
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.scale)

    def first_tokens(self, vocabulary_size: int) -> OutputHead:
        """The head of the first tokens of the vocabulary only."""
        bias = None if self.bias is None else self.bias[:vocabulary_size]
        return OutputHead(self.weight[:vocabulary_size], bias, self.scale)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) in the head's type, as the model itself gives them."""
        logits_TV = functional.linear(hidden_TD.to(self.weight.dtype), self.weight, self.bias)
        return logits_TV if self.scale == 1.0 else logits_TV * self.scale

    def hidden_gradient(self, gradient_TV: torch.Tensor) -> torch.Tensor:
        """The gradient of hidden (T, D) from that of the logits; overwrites its argument if the head is scaled."""
        if self.scale != 1.0:
            gradient_TV.mul_(self.scale)
        return gradient_TV.to(self.weight.dtype) @ self.weight
