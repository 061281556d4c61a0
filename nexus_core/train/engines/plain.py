"""Every process holds the whole model and optimizer; gradients are summed over the processes. Alone, plain PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from nexus_core.processes import sum_in_place, world
from nexus_core.train.engines.engine import Change
from nexus_core.train.on_demand import OnDemand
from nexus_core.train.optimizer import Optimizer, Part
from nexus_core.train.setup import Trainables


class PlainEngine:
    """An `Engine` around `Optimizer`. What it gives as whole is the model's own, not a copy."""

    def __init__(self, model: nn.Module, trainables: Trainables, *, weight_decay: float):
        self.model: Any = model
        self._parameters = trainables.parameters
        self._optimizer = Optimizer(trainables.groups, weight_decay=weight_decay)
        self._learning_rate = 0.0
        self._fixed: Collection[Part] = ()

    def begin(self, learning_rate: float, fixed: Collection[Part]) -> None:
        self._learning_rate, self._fixed = learning_rate, fixed

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()

    def forget_gradients(self) -> None:
        self._optimizer.forget_gradients()

    def step(self, *, max_gradient_norm: float) -> float:
        if not world().alone:
            for gradient in self._optimizer.gradients():
                sum_in_place(gradient)
        return self._optimizer.step(self._learning_rate, max_gradient_norm=max_gradient_norm, fixed=self._fixed)

    def learning_rates(self) -> dict[Part, float]:
        return self._optimizer.learning_rates(self._learning_rate, fixed=self._fixed)

    @torch.no_grad()
    def change(self, change: Change) -> None:
        self._optimizer.change(change)

    def masters(self) -> Mapping[str, torch.Tensor]:
        return self._optimizer.masters()

    def writing(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)

    def state_tensors(self) -> OnDemand:
        return self._optimizer.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._optimizer.load_state_tensors(tensors)

    def close(self) -> None:
        self._optimizer.close()
