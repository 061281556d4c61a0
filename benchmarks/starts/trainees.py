"""Models made ready for each way to learn, and the parameters that learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.starts.conversions import Conversions
from benchmarks.starts.experts import DenseExperts, hold_dense
from benchmarks.starts.subjects import Training
from nexus_core.additions import SharedExpert
from nexus_core.models import load
from nexus_core.train.setup import router_parameter_names

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# Ranks that give LoRA about as many parameters as one shared expert per layer of the embedded model has (99,328):
# 99,712 on attention and router; 98,816 on attention and, with rank 1 in each of the 32, on the experts.
RANK, EXPERT_RANK, RANK_BESIDE_EXPERTS = 19, 1, 9

# The losses hold the output head fixed, so that it is no part of full fine-tuning either.
OUTPUT_HEAD = "lm_head.weight"


def ready(training: Training, conversions: Conversions) -> tuple[Any, dict[str, nn.Parameter]]:
    """A model, everything frozen but the named parameters that its subject trains."""
    subject, base = training.subject, conversions.setting.checkpoint
    checkpoint = conversions.checkpoint(training) if subject.kind == "shared" else base
    model: Any = load(checkpoint, dtype=torch.float32)
    hold_dense(model)
    if subject.rescaled:
        rescale(model)
    model.requires_grad_(False)
    if subject.kind == "router" or subject.trains_router:
        base.family.hook.nexus_attach_router_delta(model=model)
    if subject.kind in ("lora", "lora_experts"):
        _add_lora(model, on_experts=subject.kind == "lora_experts", seed=training.seed)
    everything = dict(model.named_parameters())
    names = {
        "shared": lambda: _shared_expert_names(model) | router_names(model),
        "router": lambda: router_names(model),
        "full": lambda: everything.keys() - {OUTPUT_HEAD},
        "lora": lambda: {name for name in everything if ".lora_" in name},
        "lora_experts": lambda: {name for name in everything if ".lora_" in name},
    }[subject.kind]()
    learning = {name: everything[name].requires_grad_(True) for name in everything if name in names}
    return model, learning


@torch.no_grad()
def rescale(model: nn.Module) -> None:
    """Make the shared experts' rows of gate and up as long as the experts' rows at their places are on average."""
    for block in model.modules():
        shared, experts = getattr(block, "shared_expert", None), getattr(block, "experts", None)
        if isinstance(shared, SharedExpert) and isinstance(experts, DenseExperts):
            gate, up = experts.gate_up.chunk(2, dim=1)
            for linear, rows in ((shared.gate_proj, gate), (shared.up_proj, up)):
                length = torch.linalg.vector_norm(rows, dim=2).mean(dim=0)
                linear.weight.mul_((length / torch.linalg.vector_norm(linear.weight, dim=1))[:, None])


def _shared_expert_names(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, SharedExpert)
        for name, _ in module.named_parameters()
    }


def router_names(model: nn.Module) -> set[str]:
    """The routers' changes, but for the selection biases, which no gradient reaches."""
    return {name for name in router_parameter_names(model) if not name.endswith("selection_bias")}


def _add_lora(model: nn.Module, *, on_experts: bool, seed: int) -> None:
    """LoRA by peft, its scale 2, in place. It draws its first matrices from torch's global generator."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    rank = RANK_BESIDE_EXPERTS if on_experts else RANK
    parameters = ["experts.gate_up", "experts.down"] if on_experts else ["router.weight"]
    ranks = dict.fromkeys(parameters, EXPERT_RANK) if on_experts else {}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(ATTENTION),
        target_parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern={name: 2 * r for name, r in ranks.items()},
    )
    inject_adapter_in_model(config, model)
