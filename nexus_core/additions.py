"""What NEXUS adds to a model: a shared expert and a router change, each of which can be switched off.

Switched off, the model is its base again, to the bit: that is the one-copy teacher.

    # T tokens, D hidden size, F shared expert width, E experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nexus_core.errors import UsageError
from nexus_core.types import ExpertWeights

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Addition(nn.Module):
    """A module that is not the base's; `is_off` makes the layer that holds it behave as if it were not there."""

    is_off: bool = False


class SharedExpert(Addition):
    """One always-on expert: down(activation(gate(x), up(x))), for x (..., D).

    activation: the family's own, of gate and up (..., F). Its linear modules are called gate_proj, up_proj and
    down_proj, so its tensors are `...shared_expert.gate_proj.weight (F, D)` and so on.
    """

    def __init__(self, hidden_size: int, width: int, activation: Activation, *, has_bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=has_bias)
        self.up_proj = nn.Linear(hidden_size, width, bias=has_bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=has_bias)
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up = self.activation(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        return self.down_proj(gate_up)

    def zero_start(self) -> None:
        """Make the output exactly zero, so that adding it changes nothing."""
        with torch.no_grad():
            for parameter in self.down_proj.parameters():
                parameter.zero_()

    def load(self, weights: ExpertWeights) -> None:
        """Take over an expert's numbers; missing biases become zero."""
        with torch.no_grad():
            for linear, weight, bias in (
                (self.gate_proj, weights.gate, weights.gate_bias),
                (self.up_proj, weights.up, weights.up_bias),
                (self.down_proj, weights.down, weights.down_bias),
            ):
                linear.weight.copy_(weight)
                if linear.bias is not None:
                    linear.bias.zero_() if bias is None else linear.bias.copy_(bias)


class RouterDelta(Addition):
    """A learned change of a router, zero at first: logits_TE(x) = base logits + x @ weight.T + bias.

    The base router's own numbers are never touched. Held apart, the change keeps the resolution of its own scale:
    a step of 1e-5 would vanish in a bfloat16 weight of 0.1, whose neighbours are 5e-4 away.

    selection_bias (E,) is no part of the logits: it is added to what experts are chosen by (the logits, or the scores
    of a family that has such a bias of its own), and the weights of the chosen ones do not feel it. Rules move it.
    """

    def __init__(self, hidden_size: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(experts))
        self.selection_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden_states, self.weight, self.bias)


def refuse_unless_attachable(config: Any, width: int) -> None:
    """For a model's `attach_shared_expert`: raises UsageError if width is not positive, or if the model has shared
    experts already, as its config says (`shared_expert_width`, 0 for none).
    """
    if width < 1:
        raise UsageError(f"a shared expert of width {width}: it must have at least one neuron")
    if config.shared_expert_width:
        raise UsageError(
            f"this model already has shared experts, of width {config.shared_expert_width}; give the untouched base"
        )


def additions(model: nn.Module) -> list[Addition]:
    """All additions of a model, in module order; empty for an untouched base."""
    return [module for module in model.modules() if isinstance(module, Addition)]


def router_tensors(router: nn.Module) -> dict[str, torch.Tensor]:
    """A base router's own parameters and buffers by name, those of modules inside it too, without a change's."""
    own = [(prefix, module) for prefix, module in router.named_modules() if not isinstance(module, Addition)]
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in own
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in tensors
    }


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context the model is its base: shared experts and router changes are off.

    No second copy of anything. Leaves with the state it found, so it nests, also after an exception.
    """
    switched = [module for module in additions(model) if not module.is_off]
    for module in switched:
        module.is_off = True
    try:
        yield model
    finally:
        for module in switched:
            module.is_off = False
