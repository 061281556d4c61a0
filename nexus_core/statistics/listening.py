"""Listens to the routers of a running model, whatever its family, without changing it.

# T tokens, D hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nexus_core.errors import StageError
from nexus_core.plugins import Family
from nexus_core.types import MoeBlock, RouterOutput


@dataclass(frozen=True)
class HeardLayer:
    """What one layer did in a forward pass. inputs and outputs (T, D): of its MoE block, None unless asked for."""

    router: RouterOutput
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None


Take = Callable[[int, HeardLayer], None]


@dataclass
class Listener:
    """What the layers did in the last forward pass inside the context, by layer index.

    routers: as they put it out, with the autograd graph where there is one. inputs and outputs (T, D): of the MoE
    blocks, empty unless `keeps_inputs`. All are empty where layers are handed on.
    """

    layers: tuple[int, ...]
    keeps_inputs: bool = False
    routers: dict[int, RouterOutput] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    _take: Take | None = field(default=None, init=False)
    _taken: set[int] = field(default_factory=set, init=False)

    def hand_on(self, take: Take) -> None:
        """From now on give each layer to `take` as soon as it is done, in whatever order layers are, and hold none of
        it, so that one layer's tensors are there at a time and not all layers'. To be cleared before each forward pass.
        """
        self._take = take

    def clear(self) -> None:
        """Forget what was heard, so that its memory is free before the next forward pass."""
        for heard in (self.routers, self.inputs, self.outputs, self._taken):
            heard.clear()

    def refuse_if_incomplete(self) -> None:
        """Raises StageError if a layer was not heard: its router, or its block, is not called as a module."""
        heard = self._taken if self._take else self.routers
        silent = [layer for layer in self.layers if layer not in heard]
        if silent:
            raise StageError(
                f"the routers of layers {silent} were not heard in the forward pass; the plugin's nexus_moe_blocks "
                "must name modules that are called"
            )

    def hear_router(self, layer: int, router: RouterOutput) -> None:
        """Called by `listen` when a router has run."""
        self.routers[layer] = router
        self._hand_on_if_done(layer)

    def hear_block(self, layer: int, inputs_TD: torch.Tensor, outputs_TD: torch.Tensor) -> None:
        """Called by `listen` when a MoE block has run."""
        self.inputs[layer], self.outputs[layer] = inputs_TD, outputs_TD
        self._hand_on_if_done(layer)

    def _hand_on_if_done(self, layer: int) -> None:
        # A router mostly runs inside of its block, but a family may call it before or after.
        if self._take is None or layer not in self.routers or (self.keeps_inputs and layer not in self.outputs):
            return
        if layer in self._taken:
            raise StageError(
                f"layer {layer} ran twice in one forward pass, so its tokens would count twice; the plugin's "
                "nexus_moe_blocks must name modules that run once"
            )
        self._taken.add(layer)
        self._take(
            layer, HeardLayer(self.routers.pop(layer), self.inputs.pop(layer, None), self.outputs.pop(layer, None))
        )


@contextmanager
def listen(model: nn.Module, family: Family, *, keep_inputs: bool = False) -> Iterator[Listener]:
    """Inside this context a Listener hears every forward pass of `model`; what it heard stays readable afterwards.

    keep_inputs: also keep what goes into and comes out of each MoE block. With gradient checkpointing layers run
    again during the backward pass; that is not heard, inside the context or after it.
    """
    blocks: list[MoeBlock] = family.hook.nexus_moe_blocks(model=model)
    listener = Listener(tuple(block.layer for block in blocks), keep_inputs)
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.router.register_forward_hook(_router_hook(listener, block.layer, family)).remove)
            if keep_inputs:
                handle = block.block.register_forward_hook(_block_hook(listener, block.layer), with_kwargs=True)
                hooks.callback(handle.remove)
        yield listener


def _router_hook(listener: Listener, layer: int, family: Family) -> Any:
    def hear(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not _is_recomputation():
            listener.hear_router(layer, family.hook.nexus_router_logits(output=output))

    return hear


def _block_hook(listener: Listener, layer: int) -> Any:
    def hear(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if _is_recomputation():
            return
        hidden_states = arguments[0] if arguments else keywords["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        inputs_TD, outputs_TD = (each.reshape(-1, each.shape[-1]) for each in (hidden_states, result))
        listener.hear_block(layer, inputs_TD, outputs_TD)

    return hear


def _is_recomputation() -> bool:
    # Autograd runs a checkpointed layer again while a backward pass is under way, and torch.utils.checkpoint itself
    # tells so by this number; a forward pass proper never has one.
    return torch._C._current_graph_task_id() != -1
