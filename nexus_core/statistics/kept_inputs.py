"""A few MoE inputs per layer, with what the routed experts made of them: what `convert` tries its start on.

# N inputs kept, T tokens, D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

FILE_NAME = "moe_inputs.safetensors"


class KeptInputs:
    """Inputs and outputs of the same `count` tokens in every layer, evenly spread over a stream of `tokens` tokens.

    Kept on the CPU in float32. Which tokens is known beforehand, so nothing is drawn and nothing replaced. passed: how
    many tokens of the stream somebody else sees before the first pass.
    """

    def __init__(self, layers: Sequence[int], tokens: int, count: int, *, passed: int = 0):
        self.layers = tuple(layers)
        count = min(count, tokens)
        # The middle of each of `count` equal stretches.
        self._wanted = (torch.arange(count) * 2 + 1) * tokens // max(2 * count, 1)
        self._seen = passed
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self._outputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def begin(self, mask_T: torch.Tensor) -> None:
        """One forward pass is to come. mask_T: which of its tokens count, on CPU."""
        places = mask_T.nonzero().flatten()
        here = self._wanted[(self._wanted >= self._seen) & (self._wanted < self._seen + len(places))] - self._seen
        self._seen += len(places)
        self._chosen = places[here]

    def take(self, layer: int, inputs_TD: torch.Tensor, outputs_TD: torch.Tensor) -> None:
        """What is wanted of one layer of the forward pass that has begun; layers may come in any order."""
        if not len(self._chosen):
            return
        chosen = self._chosen.to(inputs_TD.device)
        for kept, heard_TD in ((self._inputs, inputs_TD), (self._outputs, outputs_TD)):
            kept[layer].append(heard_TD[chosen].float().cpu())

    def tensors(self) -> dict[str, torch.Tensor]:
        """`layers.{layer}.inputs` and `layers.{layer}.outputs`, (N, D) float32 each; empty if nothing was kept."""
        return {
            f"layers.{layer}.{role}": torch.cat(kept[layer])
            for layer in self.layers
            for role, kept in (("inputs", self._inputs), ("outputs", self._outputs))
            if kept[layer]
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Everything kept so far, to go on after an interruption."""
        return {"seen": torch.tensor(self._seen), **self.tensors()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on after `state`."""
        self._seen = int(state["seen"])
        for layer in self.layers:
            for role, kept in (("inputs", self._inputs), ("outputs", self._outputs)):
                name = f"layers.{layer}.{role}"
                kept[layer] = [state[name]] if name in state else []
