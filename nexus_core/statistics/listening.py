"""Listens to the routers of a running model, whatever its family, without changing it.

# T tokens, D hidden size
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nexus_core.errors import StageError
from nexus_core.plugins import Family
from nexus_core.types import MoeBlock, RouterOutput


@dataclass
class Listener:
    """What the layers did in the last forward pass inside the context, by layer index.

    routers: as they put it out, with the autograd graph where there is one. inputs and outputs (T, D): of the MoE
    blocks, empty unless asked for.
    """

    layers: tuple[int, ...]
    routers: dict[int, RouterOutput] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget what was heard, so that its memory is free before the next forward pass."""
        for heard in (self.routers, self.inputs, self.outputs):
            heard.clear()

    def refuse_if_incomplete(self) -> None:
        """Raises StageError if a layer was not heard: its router is not called as a module."""
        silent = [layer for layer in self.layers if layer not in self.routers]
        if silent:
            raise StageError(
                f"the routers of layers {silent} were not heard in the forward pass; the plugin's nexus_moe_blocks "
                "must name modules that are called"
            )


@contextmanager
def listen(model: nn.Module, family: Family, *, keep_inputs: bool = False) -> Iterator[Listener]:
    """Inside this context a Listener hears every forward pass of `model`; what it heard stays readable afterwards.

    keep_inputs: also keep what goes into and comes out of each MoE block. With gradient checkpointing layers run
    again during the backward pass; that is not heard, inside the context or after it.
    """
    blocks: list[MoeBlock] = family.hook.nexus_moe_blocks(model=model)
    listener = Listener(tuple(block.layer for block in blocks))
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
            listener.routers[layer] = family.hook.nexus_router_logits(output=output)

    return hear


def _block_hook(listener: Listener, layer: int) -> Any:
    def hear(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if _is_recomputation():
            return
        hidden_states = arguments[0] if arguments else keywords["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        listener.inputs[layer] = hidden_states.reshape(-1, hidden_states.shape[-1])
        listener.outputs[layer] = result.reshape(-1, result.shape[-1])

    return hear


def _is_recomputation() -> bool:
    # Autograd runs a checkpointed layer again while a backward pass is under way, and torch.utils.checkpoint itself
    # tells so by this number; a forward pass proper never has one.
    return torch._C._current_graph_task_id() != -1
