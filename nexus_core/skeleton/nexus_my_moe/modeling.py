"""The model with room for NEXUS's additions: a shared expert per layer, and a learned change of each router.

The base's code runs as it is. A forward hook on each block adds the shared expert's output, one on each router adds the
change to the logits and routes again. Absent or switched off they do nothing, so the base's own numbers come out, to
the bit: that is what makes the frozen model its own teacher.

    # T tokens, D hidden size, E experts, K experts per token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from nexus_core.additions import RouterDelta, SharedExpert, refuse_unless_attachable
from nexus_core.families.strict import StrictlyLoaded
from nexus_core.types import MoeBlock
from nexus_my_moe.base import MyMoeConfig, MyMoeForCausalLM, route


class NexusMyMoeConfig(MyMoeConfig):
    """The base's configuration and what NEXUS adds: the shared experts' width (0 for none), learned router changes."""

    model_type = "nexus_my_moe"
    shared_expert_width: int = 0
    has_router_delta: bool = False


class NexusMyMoeForCausalLM(StrictlyLoaded, MyMoeForCausalLM):
    """The base, and the additions that its configuration says. Loading refuses missing and unknown tensors by name."""

    config_class = NexusMyMoeConfig
    # A step of 1e-5 vanishes in bfloat16; the changes are small enough to stay float32.
    _keep_in_fp32_modules_strict = ("router_delta",)

    def __init__(self, config: NexusMyMoeConfig):
        super().__init__(config)
        for found in self.moe_blocks():
            found.block.register_forward_hook(add_shared_expert)
            found.router.register_forward_hook(change_routing)
            found.block.shared_expert = self.new_shared_expert() if config.shared_expert_width else None
            found.router.router_delta = self.new_router_delta() if config.has_router_delta else None

    def moe_blocks(self) -> list[MoeBlock]:
        """ADAPT: the block and the router of every layer that has experts, in the order of the layers."""
        return [MoeBlock(number, layer.mlp, layer.mlp.gate) for number, layer in enumerate(self.model.layers)]

    def new_shared_expert(self) -> SharedExpert:
        """Random features and a zero output: adding it changes nothing."""
        expert = SharedExpert(self.config.hidden_size, self.config.shared_expert_width, self.activation, has_bias=False)
        expert.zero_start()
        return expert

    def activation(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """ADAPT: what the family's expert neurons put out."""
        return ACT2FN[self.config.hidden_act](gate) * up

    def new_router_delta(self) -> RouterDelta:
        return RouterDelta(self.config.hidden_size, self.config.num_experts)

    def attach_shared_expert(self, width: int) -> None:
        """Raises UsageError if width is not positive, or the model has shared experts already."""
        refuse_unless_attachable(self.config, width)
        self.config.shared_expert_width = width
        for found in self.moe_blocks():
            weight = found.router.weight
            found.block.shared_expert = self.new_shared_expert().to(device=weight.device, dtype=weight.dtype)

    def attach_router_delta(self) -> None:
        """A model that has them already is left alone."""
        if self.config.has_router_delta:
            return
        self.config.has_router_delta = True
        for found in self.moe_blocks():
            found.router.router_delta = self.new_router_delta().to(found.router.weight.device)


def add_shared_expert(block: Any, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a block, whose output is (B, S, D), or a tuple that begins with it."""
    shared_expert: SharedExpert | None = block.shared_expert
    if shared_expert is None or shared_expert.is_off:
        return output
    added = shared_expert(arguments[0])
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


def change_routing(router: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a router, whose output is (logits, weights, indices); a change of zero leaves it, to the bit."""
    delta: Any = router.router_delta
    if delta is None or delta.is_off:
        return output
    logits_TE, weights_TK, indices_TK = output
    changed_TE = logits_TE + delta(arguments[0].to(delta.weight.dtype))
    changed_TK, indices_TK = route(changed_TE, indices_TK.shape[-1])
    return changed_TE, changed_TK.to(weights_TK.dtype), indices_TK
