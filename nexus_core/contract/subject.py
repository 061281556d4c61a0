"""What a check is given: an untouched base checkpoint, and what can be made of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_core.additions import additions
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import PluginError
from nexus_core.models import load
from nexus_core.recipe.schema import Convert
from nexus_core.routing.parameters import is_selection_bias
from nexus_core.select.selection import LayerSelection, Selection
from nexus_core.stages.convert import convert
from nexus_core.types import MoeBlock

TOKENS_SHAPE = (2, 24)


class BrokenContract(PluginError):
    """A family does not do what its hooks promise."""


@dataclass(frozen=True)
class Subject:
    """An untouched base checkpoint and an empty folder to work in. dtype: what its model computes in."""

    folder: Path
    work: Path
    dtype: torch.dtype = torch.float32

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @property
    def hook(self) -> Any:
        return self.checkpoint.family.hook

    @cached_property
    def tokens(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.checkpoint.description.vocabulary_size, TOKENS_SHAPE, generator=generator)

    def model(self, folder: Path | None = None) -> Any:
        """The model in `folder`, or the base."""
        return load(folder or self.folder, dtype=self.dtype)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(self.tokens, use_cache=False).logits

    def converted(self, name: str = "converted", start: str = "zero") -> Path:
        """The base with the mean of its first experts as shared expert in every layer."""
        out = self.work / name
        if not out.exists():
            out.mkdir(parents=True)
            experts = tuple(range(min(2, self.checkpoint.description.experts)))
            layers = tuple(LayerSelection(layer=layer, experts=experts) for layer in self.checkpoint.description.layers)
            selection = Selection(strategy="first", top_k=len(experts), layers=layers)
            convert(self.checkpoint, selection, Convert.model_validate({"start": start}), out)
        return out

    def blocks(self, model: Any) -> list[MoeBlock]:
        """What the family says is to be listened to in a model."""
        blocks: list[MoeBlock] = self.hook.nexus_moe_blocks(model=model)
        return blocks

    def extended(self) -> Any:
        """The base with both additions, random and not zero."""
        model = self.model()
        self.hook.nexus_attach_shared_expert(model=model, width=8)
        self.hook.nexus_attach_router_delta(model=model)
        disturb(model)
        return model


def require(condition: bool, promise: str) -> None:
    """Raise BrokenContract, saying what was promised, unless the condition holds."""
    if not condition:
        raise BrokenContract(promise)


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise BrokenContract unless two tensors are the same to the bit."""
    require(found.shape == expected.shape, f"{what}: shape {list(found.shape)} instead of {list(expected.shape)}")
    if not torch.equal(found, expected):
        difference = (found.double() - expected.double()).abs().max().item()
        raise BrokenContract(f"{what}: differ by up to {difference:.3g} instead of not at all")


def disturb(model: nn.Module) -> None:
    """Give every addition of a model random numbers, the same each time.

    Selection biases stay zero: the rule of `nexus_gate_weights` is checked by what the logits alone lead to.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for addition in additions(model):
            for name, parameter in addition.named_parameters():
                if is_selection_bias(name):
                    continue
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: NaN is not equal to itself, and 8-bit floats compare to nothing on some devices."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def stored(reader: CheckpointReader, name: str) -> torch.Tensor:
    """The bytes of a tensor on disk."""
    return raw(reader.read(name))
