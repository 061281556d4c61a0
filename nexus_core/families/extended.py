"""A transformers model with room for NEXUS's additions: its own classes, two forward hooks a layer, a strict loader.

The base's code runs as it is. After its MoE block has run, a forward hook adds the shared expert's output; after its
router has run, another adds the change to the logits and routes again by the layout's rule. Both do nothing where the
addition is absent or off, so the base's own numbers come out, to the bit. Why hooks and not subclasses of every
family's block: docs/decisions/0010.

    # T tokens, D hidden size, E experts, K experts per token
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import new_class
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from nexus_core.additions import RouterDelta, SharedExpert, refuse_unless_attachable, router_tensors
from nexus_core.errors import UsageError
from nexus_core.families.layout import ROUTER_DELTA, SHARED_EXPERT, Layout, installed_layouts
from nexus_core.families.rules import ADDED_SELECTION_BIAS
from nexus_core.families.strict import StrictlyLoaded
from nexus_core.types import MoeBlock


@dataclass(frozen=True)
class ExtendedClasses:
    """A family's own classes for converted checkpoints; each is an attribute of this module under its name."""

    config: type[PreTrainedConfig]
    decoder: type[nn.Module]
    causal_lm: type[Any]


@cache
def extended_classes(layout: Layout) -> ExtendedClasses:
    """The family's configuration and model classes, made from transformers' own on first use.

    Called `Nexus` and the base class's name, e.g. NexusMyMoeForCausalLM.
    """
    base_lm, base_decoder = base_classes(layout)
    config = _named_class(
        (base_lm.config_class,),
        __annotations__={"shared_expert_width": int, "has_router_delta": bool},
        __doc__="The base's configuration and what NEXUS adds: shared_expert_width (0 for none), has_router_delta.",
        model_type=layout.converted_model_type,
        shared_expert_width=0,
        has_router_delta=False,
    )
    decoder, causal_lm = (
        _named_class(
            (ExtendedModel, base),
            # A decoder is read from a causal language model's checkpoint too.
            _keys_to_ignore_on_load_unexpected=[
                *(base._keys_to_ignore_on_load_unexpected or ()),
                *([r"^lm_head\."] if base is base_decoder else ()),
            ],
            __doc__=f"{base.__name__} with room for a shared expert and a router change in every MoE layer.",
            layout=layout,
            config_class=config,
            # A step of 1e-5 vanishes in bfloat16; the changes are small enough to stay float32.
            _keep_in_fp32_modules_strict=[
                *(base._keep_in_fp32_modules_strict or ()),
                *layout.kept_float32,
                ROUTER_DELTA,
            ],
        )
        for base in (base_decoder, base_lm)
    )
    return ExtendedClasses(config, decoder, causal_lm)


def base_classes(layout: Layout) -> tuple[type[Any], type[Any]]:
    """transformers' causal language model and decoder of the family."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(layout.model_type), MODEL_MAPPING_NAMES.get(layout.model_type)
    if not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"transformers {transformers.__version__} has no causal language model of type '{layout.model_type}'; "
            "install a version that has"
        )
    causal_lm, decoder = (getattr(transformers, str(name)) for name in names)
    return causal_lm, decoder


class ExtendedModel(StrictlyLoaded):
    """What a family's extended decoder and causal language model share; stands before the base's class.

    Its configuration says which additions it has when it is built.
    """

    layout: ClassVar[Layout]
    config: Any
    dtype: torch.dtype
    _init_weights: Callable[[nn.Module], None]

    def __init__(self, config: PreTrainedConfig, *arguments: Any, **keywords: Any):
        super().__init__(config, *arguments, **keywords)  # type: ignore[call-arg]
        settings = config.to_dict()
        self.layout.prepare(self)
        for found in self.moe_blocks():
            found.block.register_forward_hook(_add_shared_expert, with_kwargs=True)
            found.router.register_forward_hook(_ChangedRouting(self.layout, settings))
            width = self.config.shared_expert_width
            setattr(found.block, SHARED_EXPERT, self._new_shared_expert(width) if width else None)
            setattr(found.router, ROUTER_DELTA, self._new_router_delta() if self.config.has_router_delta else None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts, but never rounds what the base or NEXUS holds in float32 for a reason.

        `.to(torch.bfloat16)`, which training engines call, would round rotary frequencies (on a random model of four
        layers that moved logits by 15%), selection biases and router changes.
        """
        model: Any = self
        exact, saved = tuple(model._keep_in_fp32_modules_strict), set(model.state_dict())
        kept = {
            id(tensor)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if name not in saved or any(part in name for part in exact)
        }

        def careful(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_rounded = id(tensor) in kept and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if is_rounded else moved

        return super()._apply(careful, recurse)  # type: ignore[misc]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the class's source file, which is this one, and would fall back to
        # its slowest experts; what holds the experts is its own code.
        return True

    @classmethod
    def refuse_damaged(cls, folder: Path, config: dict[str, Any]) -> None:
        from nexus_core.families.storage import check_tensors

        check_tensors(cls.layout, folder, config)

    def moe_blocks(self) -> list[MoeBlock]:
        """The block and router of every layer that has experts."""
        decoder: Any = getattr(self, "model", self)
        moe = self.layout.describe(self.config.to_dict())
        blocks = [(layer, getattr(decoder.layers[layer], self.layout.block)) for layer in moe.layers]
        return [MoeBlock(layer, block, getattr(block, self.layout.router)) for layer, block in blocks]

    def attach_shared_expert(self, width: int) -> None:
        """Give every layer a shared expert with random features and a zero output, of the model's type and device.

        Raises UsageError if width is not positive or the model has shared experts already.
        """
        refuse_unless_attachable(self.config, width)
        self.config.shared_expert_width = width
        for found in self.moe_blocks():
            shared_expert = self._new_shared_expert(width).to(device=_device(found.router), dtype=self.dtype)
            setattr(found.block, SHARED_EXPERT, shared_expert)

    def attach_router_delta(self) -> None:
        """Give every router a change of zero, in float32; a model that has them is left alone."""
        if self.config.has_router_delta:
            return
        self.config.has_router_delta = True
        for found in self.moe_blocks():
            setattr(found.router, ROUTER_DELTA, self._new_router_delta().to(_device(found.router)))

    def _new_shared_expert(self, width: int) -> SharedExpert:
        activation = partial(gated, ACT2FN[getattr(self.config, "hidden_act", "silu")])
        shared_expert = SharedExpert(self.config.hidden_size, width, activation, has_bias=False)
        for linear in (shared_expert.gate_proj, shared_expert.up_proj):
            self._init_weights(linear)
        shared_expert.zero_start()
        return shared_expert

    def _new_router_delta(self) -> RouterDelta:
        return RouterDelta(self.config.hidden_size, self.layout.describe(self.config.to_dict()).experts)


def gated(activate: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activate(gate) * up, elementwise: what a gated expert's neurons put out."""
    return activate(gate) * up


def _add_shared_expert(block: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
    """Forward hook of an MoE block: its output (B, S, D), or the first of several, and the shared expert's."""
    shared_expert: SharedExpert | None = getattr(block, SHARED_EXPERT)
    if shared_expert is None or shared_expert.is_off:
        return output
    hidden_states = arguments[0] if arguments else next(iter(keywords.values()))
    added = shared_expert(hidden_states)
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


class _ChangedRouting:
    """Forward hook of a router: the base's (logits, weights, indices), or those that its change leads to.

    The rule computes in float32 from the base's logits, whatever their type, and the weights are rounded as the base
    rounds its own: a change of zero gives the base's, to the bit.
    """

    def __init__(self, layout: Layout, settings: dict[str, Any]):
        self.layout, self.settings = layout, settings

    def __call__(self, router: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        delta: RouterDelta | None = getattr(router, ROUTER_DELTA)
        if delta is None or delta.is_off:
            return output
        logits_TE, weights_TK, _ = output
        hidden_TD = arguments[0].reshape(-1, arguments[0].shape[-1])
        changed_TE = logits_TE + delta(hidden_TD.to(delta.weight.dtype))
        tensors = router_tensors(router) | {ADDED_SELECTION_BIAS: delta.selection_bias}
        changed_TK, indices_TK = self.layout.route(self.settings, changed_TE, tensors)
        return changed_TE, changed_TK.to(weights_TK.dtype), indices_TK


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _named_class(bases: tuple[type[Any], ...], **body: Any) -> type[Any]:
    """A class that pickle finds again: an attribute of this module, called `Nexus` and the last base's name."""
    name = f"Nexus{bases[-1].__name__}"
    made = new_class(name, bases, {}, lambda namespace: namespace.update(body | {"__module__": __name__}))
    setattr(sys.modules[__name__], name, made)
    return made


def __getattr__(name: str) -> Any:
    # Reached in a process that unpickles before it has made the family's classes.
    if name.startswith("Nexus"):
        for layout in installed_layouts():
            classes = extended_classes(layout)
            for found in (classes.config, classes.decoder, classes.causal_lm):
                if found.__name__ == name:
                    return found
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
