"""Matrices that stay fp8 with block scales: decoded for each product on the way forward, and again on the way back.

Number = fp8 e4m3 times the float32 scale of its block. No kernel is needed, inputs are not quantized, and gradients
reach inputs only. Source of the format: https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/fp8_cast_bf16.py

    # T tokens, D hidden size, E experts, F expert width, K experts per token
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nexus_core.errors import ShapeError
from nexus_core.types import ExpertWeights

Block = tuple[int, int]


def decode(weight: torch.Tensor, scales: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (R, C) of fp8 values (R, C) and scales (ceil(R / rows), ceil(C / columns)), rounded once to dtype.

    block: rows and columns that share a scale. Raises ShapeError if the scales do not cover the values.
    """
    needed = tuple(-(-size // length) for size, length in zip(weight.shape, block, strict=True))
    if tuple(scales.shape) != needed:
        raise ShapeError(f"fp8.decode: scales {list(scales.shape)} for values {list(weight.shape)}, not {list(needed)}")
    rows, columns = weight.shape
    decoded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # A CPU takes a row of blocks at a time, which stays in its cache (three times as fast); a GPU the whole matrix at
    # once, because it would wait for the launches.
    step = block[0] if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        tile = weight[start : start + step].float()
        spread = scales[start // block[0] : -(-(start + step) // block[0])].float()
        spread = spread.repeat_interleave(block[1], dim=1)[:, :columns]
        if len(spread) > 1:
            spread = spread.repeat_interleave(block[0], dim=0)[: len(tile)]
        decoded[start : start + step] = tile.mul_(spread)
    return decoded


class _Product(torch.autograd.Function):
    """inputs (T, C) times the transposed matrix that `read` decodes; keeps the stored form, never the decoded one."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, read: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        ctx.read = read
        return functional.linear(inputs, read(inputs.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad @ ctx.read(grad.dtype), None


class Fp8Module(nn.Module):
    """Frozen fp8 matrices and their scales, which keep their types when the model is cast to another."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def hold(self, name: str, *shape: int, scales: tuple[int, ...]) -> None:
        """Two parameters: `name`, and its scales under `name`_scale_inv; to be loaded."""
        values = torch.zeros(shape, dtype=torch.float8_e4m3fn)
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        ones = torch.ones(scales, dtype=torch.float32)
        self.register_parameter(f"{name}_scale_inv", nn.Parameter(ones, requires_grad=False))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            cast = fn(tensor)
            return cast if cast.dtype == tensor.dtype else tensor.to(cast.device)

        return super()._apply(moved, recurse)


class Fp8Linear(Fp8Module):
    """A linear map (..., C) to (..., R) whose weight (R, C) stays fp8; a bias is an ordinary one."""

    weight: torch.Tensor
    weight_scale_inv: torch.Tensor

    def __init__(self, inputs: int, outputs: int, block: Block, *, has_bias: bool):
        super().__init__(block)
        self.hold("weight", outputs, inputs, scales=(-(-outputs // block[0]), -(-inputs // block[1])))
        self.bias = nn.Parameter(torch.zeros(outputs)) if has_bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = _Product.apply(inputs, self._decoded)
        return outputs if self.bias is None else outputs + self.bias

    def _decoded(self, dtype: torch.dtype) -> torch.Tensor:
        return decode(self.weight, self.weight_scale_inv, self.block, dtype)


class Fp8Experts(Fp8Module):
    """The routed experts of one layer, frozen, one dense at a time: (T, D), indices and weights (T, K) to (T, D).

    The order of operations is that of transformers' own loop over experts.
    """

    gate_up_proj: torch.Tensor
    gate_up_proj_scale_inv: torch.Tensor
    down_proj: torch.Tensor
    down_proj_scale_inv: torch.Tensor

    def __init__(self, experts: int, hidden_size: int, width: int, block: Block, activate: nn.Module):
        super().__init__(block)
        self.width, self.activate = width, activate
        rows, columns = -(-width // block[0]), -(-hidden_size // block[1])
        self.hold("gate_up_proj", experts, 2 * width, hidden_size, scales=(experts, 2 * rows, columns))
        rows, columns = -(-hidden_size // block[0]), -(-width // block[1])
        self.hold("down_proj", experts, hidden_size, width, scales=(experts, rows, columns))

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        summed_TD = torch.zeros_like(hidden_TD)
        for expert in indices_TK.unique().tolist():
            tokens, slots = torch.where(indices_TK == expert)
            chosen = hidden_TD[tokens]
            gate, up = (_Product.apply(chosen, self._gate_or_up(expert, part)) for part in (0, 1))
            output = _Product.apply(self.activate(gate) * up, self._down(expert))
            weighted = output * weights_TK[tokens, slots, None]
            summed_TD = summed_TD.index_add(0, tokens, weighted.to(summed_TD.dtype))
        return summed_TD

    def expert(self, expert: int, dtype: torch.dtype) -> ExpertWeights:
        """One expert, dense."""
        gate, up = (self._gate_or_up(expert, part)(dtype) for part in (0, 1))
        return ExpertWeights(gate, up, self._down(expert)(dtype))

    def _gate_or_up(self, expert: int, part: int) -> Callable[[torch.dtype], torch.Tensor]:
        # Gate and up were scaled apart, so where the width is no multiple of a block's rows each has a ragged last one.
        def read(dtype: torch.dtype) -> torch.Tensor:
            scales = self.gate_up_proj_scale_inv[expert].chunk(2)[part]
            return decode(self.gate_up_proj[expert].chunk(2)[part], scales, self.block, dtype)

        return read

    def _down(self, expert: int) -> Callable[[torch.dtype], torch.Tensor]:
        def read(dtype: torch.dtype) -> torch.Tensor:
            return decode(self.down_proj[expert], self.down_proj_scale_inv[expert], self.block, dtype)

        return read


def replace_linears(model: Any, block: Block) -> None:
    """Put fp8 modules where a newly built model's layers have linear maps and experts; routers and head stay."""
    decoder = getattr(model, "model", model)
    for layer in decoder.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                new: nn.Module = Fp8Linear(
                    module.in_features, module.out_features, block, has_bias=module.bias is not None
                )
            elif name.endswith(".experts"):
                experts, hidden_size, width = module.down_proj.shape
                new = Fp8Experts(experts, hidden_size, width, block, module.act_fn)
            else:
                continue
            layer.set_submodule(name, new)
