"""AdamW whose numbers are always float32, whatever the model computes in.

A step of 1e-5 is lost in a bfloat16 weight of 0.1, whose neighbours are 5e-4 away. So every parameter in bfloat16 has
a float32 master: gradients are summed in float32, AdamW moves the master, and the parameter is its rounded copy. How
that is kept in 14 bytes a number instead of 18 is in `float32_masters`. A parameter that is float32 already is its own
master.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.train.float32_masters import Buffers, Float32Master, Move
from nexus_core.train.on_demand import OnDemand

# What AdamW keeps of every parameter; a checkpoint may hold others' tensors beside these.
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")

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
        """keeps_copies: parameters in float32 get a master of their own too, and may be gone between steps."""
        self._groups = [
            _Group(
                {name: Float32Master.of(parameter, keeps_copy=keeps_copies) for name, parameter in members.items()},
                weight_decay if has_decay else 0.0,
                group.lr_multiplier,
                group.part,
            )
            for group, has_decay, members in _by_decay(groups)
        ]
        self._masters = {name: master for group in self._groups for name, master in group.masters.items()}

    @property
    def names(self) -> Collection[str]:
        """Of the parameters, in the order of the groups."""
        return self._masters.keys()

    def learning_rates(self, learning_rate: float, *, fixed: Collection[Part] = ()) -> dict[Part, float]:
        """Of each part in a step with this rate; 0 for parts that no longer learn."""
        return {
            group.part: 0.0 if group.part in fixed else learning_rate * group.lr_multiplier for group in self._groups
        }

    def forget_gradients(self) -> None:
        """Drop what the backward passes since the last step have summed."""
        for master in self._masters.values():
            master.gradient = None

    @torch.no_grad()
    def step(self, learning_rate: float, *, max_gradient_norm: float, fixed: Collection[Part] = ()) -> float:
        """Clip, move every parameter, forget the gradients; returns the gradient's norm before clipping.

        fixed: parts that no longer learn. Raises TrainingError, with nothing moved, if the norm is not finite.
        """
        for group in self._groups:
            if group.part in fixed:
                # without a gradient they are passed over: no decay, no momentum
                for master in group.masters.values():
                    master.gradient = None
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            self.forget_gradients()
            raise TrainingError(f"the gradient norm is {float(norm)}")
        # One parameter after the other, each to its end: what a step needs beside the state is one piece's.
        buffers, clip = Buffers(), _clip(norm, max_gradient_norm)
        for group in self._groups:
            move = Move(clip, learning_rate * group.lr_multiplier, group.weight_decay)
            for master in group.masters.values():
                if master.gradient is not None:
                    master.step(move, buffers)
        return float(norm)

    def _gradient_norm(self) -> torch.Tensor:
        """Of all gradients together, a float32 number on the CPU, to the bit as `clip_grad_norm_` has it there."""
        norms = [master.gradient_norm() for master in self._masters.values() if master.gradient is not None]
        if not norms:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])).cpu()

    def gradients(self) -> Iterator[torch.Tensor]:
        """What the backward passes since the last step have summed, in the order of the groups; changed in place.

        They are float32 from then on, 4 bytes a number: for sums over several processes, which bfloat16 would round.
        """
        return (master.sum_in_float32() for master in self._masters.values() if master.gradient is not None)

    def change(self, change: Callable[[str, torch.Tensor], None]) -> None:
        """Call with each name and its float32 numbers, whole, to be changed in place; parameters follow them."""
        for name, master in self._masters.items():
            master.change(partial(change, name))

    def masters(self) -> Mapping[str, torch.Tensor]:
        """The float32 numbers by parameter name; each is a copy, made when it is asked for."""
        return OnDemand({name: master.numbers for name, master in self._masters.items()})

    def state_tensors(self) -> OnDemand:
        """Masters and AdamW's state, as `master/NAME`, `step/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, in one order
        however they came about.

        Masters are copies, each made when it is asked for; the rest is what the next step changes.
        """
        tensors = {
            f"master/{name}": master.numbers for name, master in self._masters.items() if not master.is_parameter
        }
        for name, master in self._masters.items():
            kinds = [kind for kind in _ADAM_STATE if kind in master.adam]
            tensors |= {f"{kind}/{name}": partial(master.adam.__getitem__, kind) for kind in kinds}
        return OnDemand(tensors)

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave; parameters in bfloat16 become their masters' rounded copies."""
        for name, master in self._masters.items():
            if not master.is_parameter:
                self.set_master(name, tensors[f"master/{name}"])
        for key in tensors:
            kind, _, name = key.partition("/")
            if kind in _ADAM_STATE:
                master = self._masters[name]
                master.adam[kind] = tensors[key].to(master.parameter.device, copy=True)

    def set_master(self, name: str, numbers: torch.Tensor) -> None:
        """Give a parameter these float32 numbers."""
        self._masters[name].change(lambda master: master.copy_(numbers))

    def close(self) -> None:
        """Leave the model's parameters without hooks and gradients."""
        for master in self._masters.values():
            master.close()


@dataclass(frozen=True)
class _Group:
    masters: dict[str, Float32Master]
    weight_decay: float
    lr_multiplier: float
    part: Part


def _clip(norm: torch.Tensor, max_norm: float) -> float:
    """What gradients of that norm are multiplied by, in the norm's precision, as `clip_grad_norm_` has it."""
    return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
