"""What the training loop asks of whatever holds the model, its gradients and its optimizer.

Engines differ in where things are: in one process, in several that hold the same, or cut into parts that lie on
several (ZeRO). What they compute is the same, and so is what they write: a run can go on under another engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from nexus_core.train.on_demand import OnDemand
from nexus_core.train.optimizer import Part

# Called with a name and the float32 numbers of that parameter, whole, which it changes in place.
Change = Callable[[str, torch.Tensor], None]


class Engine(Protocol):
    """A model that trains. Every process calls the same methods in the same order."""

    model: Any
    """What forward passes are run on, as `nexus_core.train.passes` does: the model, or what stands for its parts."""

    def begin(self, learning_rate: float, fixed: Collection[Part]) -> None:
        """A step begins. learning_rate: of the shared experts; fixed: parts that do not learn in it."""
        ...

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of this process's share of the loss; the step's gradient is the sum over all processes.

        is_last: whether it is the last of the step's micro-batches.
        """
        ...

    def forget_gradients(self) -> None:
        """Drop what the backward passes of this step have summed; every process does, or none."""
        ...

    def step(self, *, max_gradient_norm: float) -> float:
        """Clip, move every parameter, forget the gradients; returns the gradient's norm before clipping.

        Raises TrainingError, on all processes and with nothing moved, if the norm is not finite.
        """
        ...

    def learning_rates(self) -> dict[Part, float]:
        """Of each part in this step; 0 for parts that do not learn."""
        ...

    def change(self, change: Change) -> None:
        """Change the float32 numbers of every parameter that learns by gradient, the same on all processes."""
        ...

    def masters(self) -> Mapping[str, torch.Tensor]:
        """The float32 numbers of every parameter that learns by gradient, whole, on all processes; to be read only.

        They may be made when they are asked for: whoever takes one after the other holds one at a time.
        """
        ...

    def writing(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside this context parameters that learn by a rule are whole and can be changed, alike on all processes."""
        ...

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Parameters as they were before the model was cut into parts. For the first process; others may get less."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put numbers into the parameters of these names."""
        ...

    def state_tensors(self) -> OnDemand:
        """The optimizer's state, whole, as `Optimizer.state_tensors`. For the first process; others may get less."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` of any engine gave; after `load`."""
        ...

    def close(self) -> None:
        """Leave the model without hooks and gradients."""
        ...
