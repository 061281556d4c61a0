"""Core's own answers to the hooks: plain Hugging Face behaviour for families, and the built-in strategies.

Everything here is `trylast`, so a family's own answer comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.hookspecs import hookimpl
from nexus_core.types import ExpertWeights, MoeBlock, RouterOutput, Strategy

if TYPE_CHECKING:
    import torch
    from torch import nn


@hookimpl(trylast=True)
def nexus_dequantize(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    return next(iter(tensors.values())).to(dtype) if len(tensors) == 1 else None


@hookimpl(trylast=True)
def nexus_number_fault(tensor: torch.Tensor) -> str:
    if not tensor.is_floating_point():
        return ""
    # Numbers of one byte know few operations; their NaN survives the cast.
    faults = (~(tensor.float() if tensor.itemsize == 1 else tensor).isfinite()).nonzero()
    return f"has a number at {faults[0].tolist()} that is not finite" if len(faults) else ""


@hookimpl(trylast=True)
def nexus_backends() -> dict[str, str]:
    return {}


@hookimpl(trylast=True)
def nexus_load_model(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from nexus_core.families.strict import refuse_unless_whole, refuse_whole_numbers

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    refuse_unless_whole(str(folder), info)
    refuse_whole_numbers(model, folder)
    return model.to(device).eval()


@hookimpl(trylast=True)
def nexus_router_logits(output: Any) -> RouterOutput:
    logits, weights, indices = output
    return RouterOutput(logits, weights, indices)


@hookimpl(trylast=True)
def nexus_neuron_activations(config: Mapping[str, Any], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    from torch.nn import functional

    return functional.silu(gate) * up if config.get("hidden_act") == "silu" else None


@hookimpl(trylast=True)
def nexus_expert_weights(block: MoeBlock, expert: int, dtype: torch.dtype) -> ExpertWeights | None:
    import torch

    experts: Any = getattr(block.block, "experts", None)
    held = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    # Numbers of one byte are packed or scaled: their family knows how.
    dense = [tensor for tensor in held if isinstance(tensor, torch.Tensor) and tensor.itemsize > 1]
    if len(dense) < len(held):
        return None
    gate_up, down = (tensor[expert].detach().to(dtype) for tensor in dense)
    gate, up = gate_up.chunk(2)
    return ExpertWeights(gate, up, down)


@hookimpl(trylast=True)
def nexus_reply_parts(text: str) -> tuple[str, str]:
    return "", text


@hookimpl(trylast=True)
def nexus_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    from nexus_core.additions import Addition

    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, Addition)
        for name, parameter in module.named_parameters()
    }


@hookimpl(trylast=True)
def nexus_selection_strategies() -> list[Strategy]:
    from nexus_core.select import STRATEGIES

    return STRATEGIES


@hookimpl(trylast=True)
def nexus_merge_strategies() -> list[Strategy]:
    from nexus_core.merge import STRATEGIES

    return STRATEGIES


@hookimpl(trylast=True)
def nexus_routing_strategies() -> list[Strategy]:
    from nexus_core.routing import STRATEGIES

    return STRATEGIES


@hookimpl(trylast=True)
def nexus_losses() -> list[Strategy]:
    from nexus_core.distill import STRATEGIES

    return STRATEGIES


@hookimpl(trylast=True)
def nexus_data_formats() -> list[Strategy]:
    from nexus_core.data.formats import STRATEGIES

    return STRATEGIES
