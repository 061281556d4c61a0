"""One pass of a model over sequences, and everything that is summed on the way.

# B sequences, S sequence length, T tokens of a batch (B * S)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nexus_core.data.isolation import isolates_documents, position_arguments
from nexus_core.data.samples import Sample
from nexus_core.errors import StageError
from nexus_core.stages.standing import Savable
from nexus_core.statistics.activity import ExpertActivity
from nexus_core.statistics.kept_inputs import KeptInputs
from nexus_core.statistics.listening import HeardLayer, Listener
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.probabilities import ProbabilityWriter


@dataclass(frozen=True)
class RoutedBatch:
    """input_ids and positions (B, S); sets_T: which data set each token is of, -1 for padding. All on the CPU."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    sets_T: torch.Tensor

    @property
    def tokens(self) -> int:
        """Real ones."""
        return int((self.sets_T >= 0).sum())


def batches(samples: Sequence[Sample], batch_size: int) -> list[RoutedBatch]:
    """The sequences of all sets in turn, `batch_size` at a time."""
    sequences = [sample.sequences for sample in samples]
    input_ids, positions, lengths = (
        torch.cat([getattr(each, name) for each in sequences]) for name in ("input_ids", "positions", "lengths")
    )
    set_of_row = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(each) for each in sequences]))
    is_text = torch.arange(input_ids.shape[1]) < lengths[:, None]
    sets = torch.where(is_text, set_of_row[:, None], -1)
    return [
        RoutedBatch(ids_BS, positions_BS, sets_BS.flatten())
        for ids_BS, positions_BS, sets_BS in zip(
            input_ids.split(batch_size), positions.split(batch_size), sets.split(batch_size), strict=True
        )
    ]


@dataclass
class RouterPass:
    """Runs batches through a model that `listener` listens to, and adds what is heard to the sums, layer by layer while
    the model runs: of what layers put out, no more than one layer's is held.
    """

    model: Any
    listener: Listener
    statistics: RouterStatistics
    kept: KeptInputs
    activity: ExpertActivity | None = None
    writer: ProbabilityWriter | None = None

    def __post_init__(self) -> None:
        self._isolates = isolates_documents(self.model)
        # Written token by token, so these wait for all layers; only where they are written at all.
        self._logits: dict[int, torch.Tensor] = {}

    def sums(self) -> dict[str, Savable]:
        """Everything that grows, by name; the file that may have been cut short comes first."""
        found: dict[str, Savable | None] = {
            "probabilities": self.writer,
            "router": self.statistics,
            "kept_inputs": self.kept,
            "saliency": self.activity.saliency if self.activity else None,
        }
        return {name: sums for name, sums in found.items() if sums is not None}

    @torch.inference_mode()
    def route(self, batch: RoutedBatch) -> None:
        """Add one batch. Raises StageError if a router gives numbers that are not finite or memory runs out."""
        mask_T = batch.sets_T >= 0
        # Only the last sequences of a set are padded; picking tokens would copy all the others for nothing.
        self._mask = None if bool(mask_T.all()) else mask_T.to(self.statistics.probability_sum.device)
        self._sets = batch.sets_T
        self.kept.begin(mask_T)
        if self.activity:
            self.activity.saliency.count(batch.sets_T)
        self.listener.clear()
        self.listener.hand_on(self._take)
        self._forward(batch)
        self.listener.refuse_if_incomplete()
        if self.writer:
            self.writer.write([self._logits.pop(layer) for layer in self.statistics.layers])
        self.listener.clear()
        self._refuse_non_finite()

    def _take(self, layer: int, heard: HeardLayer) -> None:
        """Add one layer of the batch that is under way."""
        if self.activity:
            self.activity.record(self.statistics, layer, heard, self._sets)
        self.statistics.update(self.statistics.layers.index(layer), heard.router, self._mask)
        if heard.inputs is not None and heard.outputs is not None:
            self.kept.take(layer, heard.inputs, heard.outputs)
        if self.writer:
            logits_TE = heard.router.logits
            self._logits[layer] = logits_TE if self._mask is None else logits_TE[self._mask]

    def _forward(self, batch: RoutedBatch) -> None:
        # Through the layers only: the output head's logits are the widest thing, and nobody reads them. Sequences are
        # padded on the right, where causal attention lets nothing see the padding.
        device = self.statistics.probability_sum.device
        arguments = position_arguments(self._isolates, batch.positions.to(device))
        try:
            self.model.base_model(input_ids=batch.input_ids.to(device), use_cache=False, **arguments)
        except torch.cuda.OutOfMemoryError as error:
            batch_size, sequence_length = batch.input_ids.shape
            raise StageError(
                f"the GPU has no memory left for {batch_size} sequences of {sequence_length} tokens; lower "
                "collect.batch_size or collect.sequence_length"
            ) from error

    def _refuse_non_finite(self) -> None:
        is_finite_L = self.statistics.probability_sum.isfinite().all(dim=1)
        if not bool(is_finite_L.all()):
            layer = self.statistics.layers[int(is_finite_L.int().argmin())]
            raise StageError(
                f"the router of layer {layer} gave numbers that are not finite; the checkpoint may be damaged, or "
                "overflow in this type: try float32 (model.dtype, --dtype)"
            )
