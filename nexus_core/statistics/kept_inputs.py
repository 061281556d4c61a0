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
    many tokens of the stream somebody else sees before the first `update`.
    """

    def __init__(self, layers: Sequence[int], tokens: int, count: int, *, passed: int = 0):
        self.layers = tuple(layers)
        count = min(count, tokens)
        # The middle of each of `count` equal stretches.
        self._wanted = (torch.arange(count) * 2 + 1) * tokens // max(2 * count, 1)
        self._seen = passed
        self._inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        self._outputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def update(
        self, inputs: Mapping[int, torch.Tensor], outputs: Mapping[int, torch.Tensor], mask_T: torch.Tensor
    ) -> None:
        """Take what is wanted of one forward pass.

        inputs, outputs: (T, D) by layer. mask_T: which tokens count, on CPU.
        """
        places = mask_T.nonzero().flatten()
        here = self._wanted[(self._wanted >= self._seen) & (self._wanted < self._seen + len(places))] - self._seen
        self._seen += len(places)
        if not len(here):
            return
        for layer in self.layers:
            for kept, heard in ((self._inputs, inputs), (self._outputs, outputs)):
                chosen = places[here].to(heard[layer].device)
                kept[layer].append(heard[layer][chosen].float().cpu())

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
