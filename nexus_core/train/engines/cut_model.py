"""A model whose parameters DeepSpeed may have cut into parts, as the rest of training sees it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class HiddenStates(nn.Module):
    """The module that DeepSpeed runs: what the output head reads, or the logits, of a causal language model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, *, gives_logits: bool, **inputs: Any) -> torch.Tensor:
        if gives_logits:
            logits: torch.Tensor = self.model(**inputs).logits
            return logits
        hidden: torch.Tensor = self.model.base_model(**inputs).last_hidden_state
        return hidden


class CutModel:
    """Stands for a transformers model in forward passes: they begin where DeepSpeed's hooks expect them to.

    hidden: what the last pass with a graph gave; None if there is none.
    """

    def __init__(self, model: Any, engine: Any):
        self._model, self._engine = model, engine
        self.base_model = _CutDecoder(self)
        self.hidden: torch.Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self._engine(gives_logits=True, **inputs))

    def decode(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The last hidden states, after the final norm."""
        hidden: torch.Tensor = self._engine(gives_logits=False, **inputs)
        if hidden.requires_grad:
            self.hidden = hidden
        return hidden

    def modules(self) -> Iterator[nn.Module]:
        """The model's own."""
        return self._model.modules()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _CutDecoder:
    """The decoder of a CutModel. forward: for its signature only."""

    def __init__(self, model: CutModel):
        self._model = model
        self.forward = model._model.base_model.forward

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self._model.decode(inputs))
