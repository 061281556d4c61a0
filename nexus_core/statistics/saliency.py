"""How much every neuron of every routed expert does, per data set; and what experts put out.

# S data sets, L layers, E experts, F expert width, D hidden size, T tokens, K experts per token, R tokens of an expert
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from nexus_core.errors import ShapeError, UsageError
from nexus_core.types import ExpertWeights, RouterOutput

FILE_NAME = "neuron_saliency.safetensors"

# What strategies call it in their `needs`.
NEED = "neuron_saliency"

LAYOUT = "neuron saliency 1"
METADATA_NAME = "nexus"


@dataclass(frozen=True)
class LayerSaliency:
    """One layer's neurons, (E, F) float64 per token: on what is to be learnt, and on what is to be kept, if known."""

    learnt_EF: np.ndarray
    kept_EF: np.ndarray | None = None

    def contrasted(self, contrast: float) -> np.ndarray:
        """Saliency on what is learnt less `contrast` times that on what is kept, (E, F).

        Raises UsageError if the latter is unknown and `contrast` is not 0.
        """
        if not contrast:
            return self.learnt_EF
        if self.kept_EF is None:
            raise UsageError(
                f"contrast is {contrast:g}, but the neuron saliency was collected over no set that is kept; collect "
                "over one too, or write 0"
            )
        return self.learnt_EF - contrast * self.kept_EF


@dataclass
class NeuronSaliency:
    """Sums over tokens, by data set; float64, so that shards merge and interrupted passes go on exactly.

    layers, sets: what the dimensions L and S are of. tokens (S,): how many there were. activity (S, L, E, F): sum over
    the tokens routed to an expert of gate weight x |activation| of each neuron. output_norm (L, E, F): norm of each
    neuron's column of down. Their product is the neurons' saliency.
    """

    layers: tuple[int, ...]
    sets: tuple[str, ...]
    tokens: torch.Tensor
    activity: torch.Tensor
    output_norm: torch.Tensor

    @classmethod
    def zeros(
        cls,
        layers: Sequence[int],
        sets: Sequence[str],
        experts: int,
        width: int,
        device: str | torch.device = "cpu",
    ) -> NeuronSaliency:
        """Of no tokens yet. device: where the model runs, so that nothing is moved."""

        def sums(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        tokens = torch.zeros(len(sets), dtype=torch.int64)
        norms = sums(len(layers), experts, width)
        return cls(tuple(layers), tuple(sets), tokens, sums(len(sets), *norms.shape), norms)

    @torch.no_grad()
    def update(
        self,
        position: int,
        hidden_TD: torch.Tensor,
        router: RouterOutput,
        sets_T: torch.Tensor,
        read: Callable[[int], ExpertWeights],
        activations: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Add the tokens of one forward pass of one layer; gives sum of gate weight x norm of output by expert, (E,).

        position: of the layer in `layers`. hidden_TD: what went into its experts. sets_T: index in `sets` of every
        token, negative for one that does not count, on any device. read: an expert's weights, in the type and on the
        device of hidden_TD. activations: the family's own. Source of the experts' sums: REAP, arXiv 2510.13999.
        """
        if len(sets_T) != len(hidden_TD) or len(router.indices) != len(hidden_TD):
            raise ShapeError(
                f"{len(hidden_TD)} inputs, {len(router.indices)} routed tokens and {len(sets_T)} set indices are not "
                "of the same tokens"
            )
        sets_T = sets_T.to(hidden_TD.device)
        output_sums_E = torch.zeros(self.activity.shape[2], dtype=torch.float64, device=hidden_TD.device)
        counted = (sets_T >= 0)[:, None]
        for expert in torch.unique(router.indices[counted.expand_as(router.indices)]).tolist():
            tokens_R, places_R = torch.where((router.indices == expert) & counted)
            gates_R = router.weights[tokens_R, places_R].double()
            weights, inputs_RD = read(expert), hidden_TD[tokens_R]
            neurons_RF = activations(
                functional.linear(inputs_RD, weights.gate, weights.gate_bias),
                functional.linear(inputs_RD, weights.up, weights.up_bias),
            )
            outputs_RD = functional.linear(neurons_RF, weights.down, weights.down_bias)
            output_sums_E[expert] = gates_R @ torch.linalg.vector_norm(outputs_RD.double(), dim=1)
            # A row per data set: its tokens' gate weights, zero elsewhere.
            gates_SR = gates_R * (sets_T[tokens_R] == torch.arange(len(self.sets), device=sets_T.device)[:, None])
            self.activity[:, position, expert] += gates_SR @ neurons_RF.double().abs()
            self.output_norm[position, expert] = torch.linalg.vector_norm(weights.down.double(), dim=0)
        return output_sums_E

    def count(self, sets_T: torch.Tensor) -> None:
        """Count the tokens of one forward pass, once for all layers."""
        self.tokens += torch.bincount(sets_T[sets_T >= 0].cpu(), minlength=len(self.sets))

    def merge(self, other: NeuronSaliency) -> NeuronSaliency:
        """The sums over both passes' tokens. Raises ShapeError if they are of different models or sets."""
        if (self.layers, self.sets) != (other.layers, other.sets) or self.activity.shape != other.activity.shape:
            raise ShapeError(
                f"neuron saliency of layers {self.layers} over {self.sets} and of layers {other.layers} over "
                f"{other.sets} cannot be merged"
            )
        others = other.to(self.activity.device)
        return NeuronSaliency(
            self.layers,
            self.sets,
            self.tokens + others.tokens,
            self.activity + others.activity,
            # The same weights' norms; zero where an expert was not seen.
            torch.maximum(self.output_norm, others.output_norm),
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Every sum on the CPU, to go on after an interruption."""
        sums = {"tokens": self.tokens, "activity": self.activity, "output_norm": self.output_norm}
        return {name: value.cpu() for name, value in sums.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on after `state`."""
        for name, value in (("tokens", self.tokens), ("activity", self.activity), ("output_norm", self.output_norm)):
            value.copy_(state[name])

    def to(self, device: str | torch.device) -> NeuronSaliency:
        """The same sums on `device`."""
        return NeuronSaliency(
            self.layers, self.sets, self.tokens, self.activity.to(device), self.output_norm.to(device)
        )

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write one safetensors file. metadata: plain data on where it comes from, kept as JSON."""
        from safetensors.torch import save

        tensors = {"layers": torch.tensor(self.layers), "tokens": self.tokens}
        for position, layer in enumerate(self.layers):
            tensors[f"layers.{layer}.output_norm"] = self.output_norm[position].cpu()
            for number, name in enumerate(self.sets):
                tensors[f"layers.{layer}.activity.{name}"] = self.activity[number, position].cpu()
        header = {METADATA_NAME: json.dumps({"layout": LAYOUT, "sets": list(self.sets), **metadata})}
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header))


class SaliencyFile:
    """`neuron_saliency.safetensors`, read a layer at a time. Raises UsageError if it is not one."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt")
            self.metadata = json.loads((self._file.metadata() or {}).get(METADATA_NAME, "{}"))
            if self.metadata.pop("layout", None) != LAYOUT:
                raise UsageError(
                    f"{self.path}: holds no neuron saliency of this version of NEXUS; run `nexus collect` again"
                )
            self.sets = tuple(self.metadata.pop("sets"))
            self.layers = tuple(self._file.get_tensor("layers").tolist())
            self.tokens = self._file.get_tensor("tokens")
        except (SafetensorError, OSError, KeyError) as error:
            raise UsageError(
                f"{self.path}: is not a whole file of neuron saliency ({error}); run `nexus collect` again"
            ) from error

    def load(self) -> NeuronSaliency:
        """All of it."""
        names = [[f"layers.{layer}.activity.{name}" for layer in self.layers] for name in self.sets]
        activity = torch.stack([torch.stack([self._file.get_tensor(name) for name in row]) for row in names])
        norms = torch.stack([self._file.get_tensor(f"layers.{layer}.output_norm") for layer in self.layers])
        return NeuronSaliency(self.layers, self.sets, self.tokens, activity, norms)

    @property
    def shape(self) -> tuple[int, int]:
        """E and F."""
        experts, width = self._file.get_slice(f"layers.{self.layers[0]}.output_norm").get_shape()
        return experts, width

    def layer(self, layer: int, learnt: Sequence[str], kept: Sequence[str]) -> LayerSaliency:
        """One layer's saliency per token: on the learnt sets together, and on the kept ones if there are any."""
        norm_EF = self._file.get_tensor(f"layers.{layer}.output_norm").numpy()

        def per_token(names: Sequence[str]) -> np.ndarray:
            activity_EF = sum(self._file.get_tensor(f"layers.{layer}.activity.{name}").numpy() for name in names)
            tokens = sum(int(self.tokens[self.sets.index(name)]) for name in names)
            return np.asarray(activity_EF) * norm_EF / max(tokens, 1)

        return LayerSaliency(per_token(learnt), per_token(kept) if kept else None)
