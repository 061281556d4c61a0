"""Packed experts, forward and input gradient, against the same experts held dense in bfloat16."""

from __future__ import annotations

import torch
from nexus_gpt_oss import mxfp4
from nexus_gpt_oss.backends.choice import NAMES
from nexus_gpt_oss.experts import PackedExperts
from torch import nn

from benchmarks.backends import clock_for, devices, finished, working
from benchmarks.measurement import Measurement, compared

EXPERTS, HIDDEN, WIDTH, EXPERTS_PER_TOKEN = 4, 2880, 2880, 1


class DenseExperts(nn.Module):
    """The obvious loop over dense weights, which holds 3.75 times the bytes."""

    def __init__(self, packed: PackedExperts):
        super().__init__()
        self.gate_up = mxfp4.decode(packed.gate_up_proj_blocks, packed.gate_up_proj_scales, torch.bfloat16)
        self.down = mxfp4.decode(packed.down_proj_blocks, packed.down_proj_scales, torch.bfloat16)
        self.gate_up_bias, self.down_bias = packed.gate_up_proj_bias.bfloat16(), packed.down_proj_bias.bfloat16()
        self.activation = packed.activation

    def forward(self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        summed_TD = torch.zeros_like(hidden_TD)
        for expert in range(len(self.gate_up)):
            tokens, places = torch.where(indices_TK == expert)
            gate_up = hidden_TD[tokens] @ self.gate_up[expert].T + self.gate_up_bias[expert]
            output = self.activation(gate_up[:, 0::2], gate_up[:, 1::2]) @ self.down[expert].T + self.down_bias[expert]
            summed_TD = summed_TD.index_add(0, tokens, output * weights_TK[tokens, places, None])
        return summed_TD


def run() -> list[Measurement]:
    """Time relative to dense experts at 512 and at 128 rows per expert, gpt-oss's real widths."""
    return [measurement for device in devices() for measurement in _on(device)]


def _on(device: torch.device) -> list[Measurement]:
    generator = torch.Generator().manual_seed(0)
    packed = PackedExperts(experts=EXPERTS, hidden_size=HIDDEN, width=WIDTH, alpha=1.702, limit=7.0)
    for name, parameter in packed.named_parameters():
        if name.endswith("blocks"):
            parameter.data.random_(0, 256, generator=generator)
        elif name.endswith("scales"):
            parameter.data.random_(116, 120, generator=generator)
    packed.to(device)
    dense = DenseExperts(packed)
    dense_bytes = 2 * (dense.gate_up.numel() + dense.down.numel())
    packed_bytes = sum(p.numel() for name, p in packed.named_parameters() if not name.endswith("bias"))
    measurements = []
    for rows in (512, 128):
        tokens = rows * EXPERTS // EXPERTS_PER_TOKEN
        hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(device).requires_grad_()
        indices = torch.arange(tokens, device=device).remainder(EXPERTS)[:, None]
        weights = torch.ones(tokens, EXPERTS_PER_TOKEN, dtype=torch.bfloat16, device=device)

        def train(
            experts: nn.Module,
            hidden: torch.Tensor = hidden,
            indices: torch.Tensor = indices,
            weights: torch.Tensor = weights,
        ) -> None:
            (gradient,) = torch.autograd.grad(experts(hidden, indices, weights).float().sum(), hidden)
            del gradient

        names = NAMES if device.type == "cuda" else ("loop", "grouped")
        ours = {f"nexus, {name}": run for name, run in working("experts", names, lambda t=train: t(packed)).items()}
        measurements += compared(
            f"experts, forward and input gradient, {rows} rows each, {device.type}",
            {"dense bfloat16": finished(lambda t=train: t(dense)), **ours},
            against="dense bfloat16",
            notes=dict.fromkeys(ours, f"weights {dense_bytes / packed_bytes:.2f} x smaller"),
            rounds=5,
            clock=clock_for(device),
        )
    return measurements
