"""The float32 numbers of one learning parameter, its gradient and AdamW's state, in as little memory as is exact.

Per number of a bfloat16 parameter: 2 bytes of gradient as the backward pass gave it (4 once a second pass, or another
process, has added to it), 2 of remainder and 8 of moments; its float32 master exists only while it is stepped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.adamw import adamw

from nexus_core.train.remainders import join, split

# Numbers of a parameter that are looked at together, so that what a step needs beside them is bounded: on a GPU two
# buffers of 64 MiB, which hold a matrix of 5,760 x 2,880 as one piece; on a CPU of 1 MiB, which caches hold.
# A multiple of 16, the numbers in a vector: elsewhere cut, other numbers would be rounded as the last ones are.
PIECE_NUMBERS = {"cpu": 2**18, "cuda": 2**24}

# AdamW's, as torch.optim.AdamW has them by default.
BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Move:
    """What a step does to a parameter: gradients times `clip`, then AdamW with these rates."""

    clip: float
    learning_rate: float
    weight_decay: float

    def __call__(self, numbers: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Change numbers and state in place, and the gradient, which is float32 like them."""
        if self.clip < 1.0:
            gradient.mul_(self.clip)
        adamw(
            [numbers],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,  # one pass over memory, and no temporaries
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )


class Buffers:
    """Float32 memory for one piece's numbers and gradient, made when first asked for, lent to one after the other."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.device, str], torch.Tensor] = {}

    def lend(self, purpose: str, piece: torch.Tensor) -> torch.Tensor:
        """A buffer of a flat piece's size, on its device; what is in it is left over from the last one."""
        key = (piece.device, purpose)
        if key not in self._made or self._made[key].numel() < piece.numel():
            self._made.pop(key, None)
            self._made[key] = torch.empty_like(piece, dtype=torch.float32)
        return self._made[key][: piece.numel()]


class Float32Master(ABC):
    """Of one parameter. gradient: what backward passes since the last step have summed, None if there was none.

    adam: AdamW's state, `step`, `exp_avg` and `exp_avg_sq`; empty before the first step.
    """

    is_parameter = False
    """Whether it is the parameter itself, which then needs no master of its own in a checkpoint."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.gradient: torch.Tensor | None = None
        self.adam: dict[str, torch.Tensor] = {}
        self._hook = parameter.register_post_accumulate_grad_hook(self._take_gradient)

    @staticmethod
    def of(parameter: nn.Parameter, *, keeps_copy: bool) -> Float32Master:
        """keeps_copy: the parameter may be changed or gone between steps, and is only ever written to."""
        if parameter.dtype in (torch.float32, torch.float64) and not keeps_copy:
            return ParameterItself(parameter)
        if parameter.dtype == torch.bfloat16 and parameter.is_contiguous() and not keeps_copy:
            return SplitMaster(parameter)
        return MasterCopy(parameter)

    def _take_gradient(self, parameter: torch.Tensor) -> None:
        arrived, parameter.grad = parameter.grad, None
        assert arrived is not None
        if self.gradient is None:
            self.gradient = arrived
        else:
            self.sum_in_float32().add_(arrived)

    def sum_in_float32(self) -> torch.Tensor:
        """The gradient, in float32 from now on, to be added to in place; there must be one."""
        assert self.gradient is not None
        if self.gradient.itemsize < torch.float32.itemsize:
            self.gradient = self.gradient.float()
        return self.gradient

    def gradient_norm(self) -> torch.Tensor:
        """Of the gradient, which there must be; computed in float32 without a copy of it."""
        assert self.gradient is not None
        dtype = torch.promote_types(self.gradient.dtype, torch.float32)
        return torch.linalg.vector_norm(self.gradient, dtype=dtype)

    @torch.no_grad()
    def step(self, move: Move, buffers: Buffers) -> None:
        """Move by the gradient, which there must be, and forget it."""
        assert self.gradient is not None
        if not self.adam:
            dtype = torch.promote_types(self.gradient.dtype, torch.float32)
            moments = {kind: torch.zeros_like(self.gradient, dtype=dtype) for kind in ("exp_avg", "exp_avg_sq")}
            self.adam = {"step": torch.zeros((), device=self.gradient.device), **moments}
        self._move(move, buffers)
        self.gradient = None

    @abstractmethod
    def _move(self, move: Move, buffers: Buffers) -> None: ...

    @abstractmethod
    def numbers(self) -> torch.Tensor:
        """A copy of the float32 numbers, in the parameter's shape."""

    @abstractmethod
    def change(self, change: Callable[[torch.Tensor], object]) -> None:
        """Call with the float32 numbers, which are changed in place; the parameter follows."""

    def close(self) -> None:
        """Leave the parameter without hook and gradient."""
        self._hook.remove()
        self.gradient = None


class ParameterItself(Float32Master):
    """A parameter that is float32, or float64, already."""

    is_parameter = True

    def _move(self, move: Move, buffers: Buffers) -> None:
        assert self.gradient is not None
        move(self.parameter.detach(), self.gradient, self.adam)

    def numbers(self) -> torch.Tensor:
        return self.parameter.detach().clone()

    @torch.no_grad()
    def change(self, change: Callable[[torch.Tensor], object]) -> None:
        change(self.parameter.detach())


class MasterCopy(Float32Master):
    """Float32 numbers beside the parameter, which is their rounded copy."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self._numbers = parameter.detach().float().clone()

    def _move(self, move: Move, buffers: Buffers) -> None:
        move(self._numbers, self.sum_in_float32(), self.adam)
        self.parameter.copy_(self._numbers)

    def numbers(self) -> torch.Tensor:
        return self._numbers.clone()

    @torch.no_grad()
    def change(self, change: Callable[[torch.Tensor], object]) -> None:
        change(self._numbers)
        self.parameter.copy_(self._numbers)


class SplitMaster(Float32Master):
    """A contiguous bfloat16 parameter and, beside it, only what rounding took away from its float32 numbers."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self._remainders = torch.zeros_like(parameter, dtype=torch.int16)

    def _move(self, move: Move, buffers: Buffers) -> None:
        assert self.gradient is not None
        rounded, remainders = self.parameter.detach().view(-1), self._remainders.view(-1)
        flat_gradient = self.gradient.reshape(-1)
        for piece in self._pieces():
            of_piece = {kind: moment.view(-1)[piece] for kind, moment in self.adam.items() if kind != "step"}
            # AdamW counts its steps: the last piece of a parameter for all of them.
            is_last = piece.stop >= len(rounded)
            of_piece["step"] = self.adam["step"] if is_last else self.adam["step"].clone()
            gradient = flat_gradient[piece]
            if gradient.dtype != torch.float32:
                gradient = buffers.lend("gradient", gradient).copy_(gradient)
            numbers = join(rounded[piece], remainders[piece], out=buffers.lend("numbers", rounded[piece]))
            move(numbers, gradient, of_piece)
            split(numbers, rounded[piece], remainders[piece])

    def _pieces(self) -> Iterator[slice]:
        size = PIECE_NUMBERS.get(self.parameter.device.type, PIECE_NUMBERS["cpu"])
        return (slice(start, start + size) for start in range(0, self.parameter.numel(), size))

    def numbers(self) -> torch.Tensor:
        return join(self.parameter.detach(), self._remainders)

    @torch.no_grad()
    def change(self, change: Callable[[torch.Tensor], object]) -> None:
        numbers = self.numbers()
        change(numbers)
        split(numbers, self.parameter.detach(), self._remainders)
