"""AdamW whose numbers are always float32, whatever the model computes in.

A step of 1e-5 is lost in a bfloat16 weight of 0.1, whose neighbours are 5e-4 away. So every parameter in bfloat16 has
a float32 master: gradients are summed into it, AdamW moves it, and the parameter is its rounded copy. A parameter
that is float32 already is its own master.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nexus_core.errors import TrainingError

# What AdamW keeps of every parameter; a checkpoint may hold others' tensors beside these.
_ADAM_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})

Part = Literal["shared_experts", "router_weights", "router_biases"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that share a learning rate, the step's times `lr_multiplier`, and stop learning together."""

    parameters: Mapping[str, nn.Parameter]
    lr_multiplier: float = 1.0
    part: Part = "shared_experts"


def adam_groups(
    groups: Sequence[ParameterGroup], tensors: Mapping[str, torch.Tensor], *, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's own groups, of `tensors` by the parameters' names: weight decay acts on matrices, not on biases."""
    return [
        {
            "params": [tensors[name] for name in members],
            "weight_decay": weight_decay if has_decay else 0.0,
            "lr_multiplier": group.lr_multiplier,
            "part": group.part,
        }
        for group, has_decay, members in _by_decay(groups)
    ]


def _by_decay(groups: Sequence[ParameterGroup]) -> Iterator[tuple[ParameterGroup, bool, dict[str, nn.Parameter]]]:
    for group in groups:
        for has_decay in (True, False):
            members = {name: p for name, p in group.parameters.items() if (p.ndim >= 2) is has_decay}
            if members:
                yield group, has_decay, members


class Optimizer:
    """Decoupled AdamW over the groups' parameters; weight decay acts on matrices, not on biases.

    Gradients of all backward passes since the last `step` are summed in float32. Its whole state is in
    `state_tensors`, so a run can be continued to the bit.
    """

    def __init__(self, groups: Sequence[ParameterGroup], *, weight_decay: float = 0.0, keeps_copies: bool = False):
        """keeps_copies: parameters in float32 get a master of their own too."""
        self._masters: dict[str, torch.Tensor] = {}
        self._rounded: dict[str, nn.Parameter] = {}
        self._hooks: list[RemovableHandle] = []
        for _, _, members in _by_decay(groups):
            for name, parameter in members.items():
                self._masters[name] = self._master(name, parameter, keeps_copies=keeps_copies)
        divided = adam_groups(groups, self._masters, weight_decay=weight_decay)
        # fused: one pass over memory, and no temporaries the size of all parameters
        self._adam = torch.optim.AdamW(divided or [{"params": []}], lr=0.0, fused=True)
        if not divided:
            self._adam.param_groups.clear()

    def _master(self, name: str, parameter: nn.Parameter, *, keeps_copies: bool) -> torch.Tensor:
        if parameter.dtype in (torch.float32, torch.float64) and not keeps_copies:
            return parameter
        master = parameter.detach().float().clone()
        self._rounded[name] = parameter

        def take_gradient(rounded: torch.Tensor) -> None:
            assert rounded.grad is not None
            gradient = rounded.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            rounded.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(take_gradient))
        return master

    def learning_rates(self, learning_rate: float, *, fixed: Collection[Part] = ()) -> dict[Part, float]:
        """Of each part in a step with this rate; 0 for parts that no longer learn."""
        return {
            group["part"]: 0.0 if group["part"] in fixed else learning_rate * group["lr_multiplier"]
            for group in self._adam.param_groups
        }

    def forget_gradients(self) -> None:
        """Drop what the backward passes since the last step have summed."""
        self._adam.zero_grad()

    def step(self, learning_rate: float, *, max_gradient_norm: float, fixed: Collection[Part] = ()) -> float:
        """Clip, move every parameter, forget the gradients; returns the gradient's norm before clipping.

        fixed: parts that no longer learn. Raises TrainingError, with nothing moved, if the norm is not finite.
        """
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
            if group["part"] in fixed:
                # without a gradient AdamW passes them over: no decay, no momentum
                for master in group["params"]:
                    master.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters.values(), max_gradient_norm))
        if not torch.isfinite(torch.tensor(norm)):
            self._adam.zero_grad()
            raise TrainingError(f"the gradient norm is {norm}")
        self._adam.step()
        self._adam.zero_grad()
        self._round()
        return norm

    def gradients(self) -> Iterator[torch.Tensor]:
        """What the backward passes since the last step have summed, in the order of the groups; changed in place."""
        return (master.grad for master in self._masters.values() if master.grad is not None)

    def _round(self) -> None:
        with torch.no_grad():
            for name, parameter in self._rounded.items():
                parameter.copy_(self._masters[name])

    def masters(self) -> dict[str, torch.Tensor]:
        """The float32 numbers by parameter name; after changing them in place, call `masters_changed`."""
        return dict(self._masters)

    def masters_changed(self) -> None:
        """Let the model's parameters follow their masters."""
        self._round()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Masters and AdamW's state, as `master/NAME`, `step/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`."""
        tensors = {f"master/{name}": self._masters[name] for name in self._rounded}
        for name, master in self._masters.items():
            for kind, tensor in self._adam.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = tensor
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave; parameters in bfloat16 become their masters' rounded copies."""
        with torch.no_grad():
            for name in self._rounded:
                self._masters[name].copy_(tensors[f"master/{name}"])
        self._round()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind in _ADAM_STATE:
                master = self._masters[name]
                self._adam.state[master][kind] = tensor.to(master.device, copy=True)

    def close(self) -> None:
        """Leave the model's parameters without hooks and gradients."""
        for hook in self._hooks:
            hook.remove()
        self._adam.zero_grad()
