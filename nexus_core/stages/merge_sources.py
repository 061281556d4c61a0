"""What a merge is made from: a checkpoint's experts, and what collect kept of the layers."""

# N kept inputs, D hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nexus_core.checkpoint.reader import TensorEntry, read_header, read_tensor
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.errors import UsageError
from nexus_core.merge import LayerExperts
from nexus_core.merge.experts import Projection, Rows
from nexus_core.statistics import saliency
from nexus_core.statistics.saliency import SaliencyFile
from nexus_core.types import ExpertWeights, MergeRequest, Strategy

READ_ROWS = "nexus_read_expert_rows"


@dataclass(frozen=True)
class MergeSources:
    """Everything that merge strategies may read, opened but not read.

    dtype: what merged experts are made in. kept: places of the MoE inputs and outputs that collect kept, by name.
    saliency: of all neurons, or None. learnt, kept_sets: names of the data sets in it that are to be learnt and kept.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    kept: Mapping[str, TensorEntry]
    saliency: SaliencyFile | None
    learnt: tuple[str, ...]
    kept_sets: tuple[str, ...]

    def layer(self, layer: int) -> LayerExperts:
        """A layer's experts, as a merge strategy gets them; only the layer's kept inputs and saliency are read."""
        # Read in the checkpoint's own type, which 4-bit numbers and bfloat16 both fit, unless another is asked for.
        source, moe = self.checkpoint, self.checkpoint.description
        hook, reader, config = source.family.hook, source.reader, source.config

        def read(expert: int) -> ExpertWeights:
            return hook.nexus_read_expert(reader=reader, config=config, layer=layer, expert=expert, dtype=source.dtype)

        def read_rows(expert: int, projection: Projection, rows: slice, dtype: torch.dtype | None) -> Rows:
            answer: Rows = hook.nexus_read_expert_rows(
                reader=reader,
                config=config,
                layer=layer,
                expert=expert,
                projection=projection,
                rows=rows,
                dtype=dtype or source.dtype,
            )
            return answer

        def activations(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return hook.nexus_neuron_activations(config=config, gate=gate, up=up)

        return LayerExperts(
            count=moe.experts,
            width=moe.expert_width,
            hidden_size=moe.hidden_size,
            has_biases=moe.has_expert_biases,
            dtype=self.dtype,
            read=read,
            activations=activations,
            read_rows=read_rows if source.family.answers(READ_ROWS) else None,
            inputs_ND=self._kept(layer, "inputs"),
            saliency=self.saliency.layer(layer, self.learnt, self.kept_sets) if self.saliency else None,
        )

    def outputs(self, layer: int) -> torch.Tensor | None:
        """What the routed experts made of the kept inputs, (N, D) float32; None if nothing was kept."""
        return self._kept(layer, "outputs")

    @property
    def kept_inputs(self) -> int:
        """N, 0 if nothing was kept."""
        return next((entry.shape[0] for entry in self.kept.values()), 0)

    def _kept(self, layer: int, part: str) -> torch.Tensor | None:
        return read_tensor(self.kept[f"layers.{layer}.{part}"]).float() if self.kept else None


def open_sources(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    moe_inputs: Path | None,
    neuron_saliency: Path | None,
    learn: Sequence[str] | None,
    keep: Sequence[str] | None,
) -> MergeSources:
    """Open what collect wrote. learn, keep: as for `convert`. Raises UsageError if it is of another model."""
    kept = read_header(moe_inputs) if moe_inputs else {}
    if kept:
        _check_kept(checkpoint, kept)
    if not neuron_saliency:
        return MergeSources(checkpoint, dtype, kept, None, tuple(learn or ()), tuple(keep or ()))
    opened = SaliencyFile(neuron_saliency)
    _check_saliency(checkpoint, opened)
    learnt = learnt_sets(opened, learn)
    kept_sets = tuple(name for name in opened.sets if name not in learnt and (keep is None or name in keep))
    return MergeSources(checkpoint, dtype, kept, opened, learnt, kept_sets)


def learnt_sets(opened: SaliencyFile, learn: Sequence[str] | None) -> tuple[str, ...]:
    """The data sets whose saliency counts. Raises UsageError if that is not clear or there are none."""
    known = ", ".join(opened.sets)
    if learn is None:
        if len(opened.sets) > 1:
            raise UsageError(
                f"{opened.path}: holds the data sets {known}; say with --learn which of them are to be learnt"
            )
        return opened.sets
    found = tuple(name for name in opened.sets if name in learn)
    if not found:
        raise UsageError(
            f"{opened.path}: holds neuron saliency on {known}, not on {', '.join(learn)}, which is to be learnt; "
            "collect over that too"
        )
    return found


def check_needs(strategy: Strategy, sources: MergeSources) -> None:
    """Raise UsageError if a strategy needs statistics that are not there."""
    if saliency.NEED in strategy.needs and sources.saliency is None:
        raise UsageError(
            f"merge '{strategy.name}' needs neuron saliency ({saliency.FILE_NAME}), and there is none; collect with "
            "expert_norms (--expert-norms) and name that folder (--statistics)"
        )


def request(strategy: Strategy, width: int, chosen: int, sources: MergeSources) -> MergeRequest:
    """What a strategy is asked for, now that everything is known."""
    moe = sources.checkpoint.description
    return MergeRequest(
        merge=strategy.name,
        width=width,
        expert_width=moe.expert_width,
        experts=moe.experts,
        chosen=chosen,
        kept_inputs=sources.kept_inputs,
        learnt=sources.learnt if sources.saliency else None,
        kept=sources.kept_sets if sources.saliency else None,
    )


def _check_kept(checkpoint: Checkpoint, kept: Mapping[str, TensorEntry]) -> None:
    hidden_size = checkpoint.description.hidden_size
    for layer in checkpoint.description.layers:
        for name in (f"layers.{layer}.inputs", f"layers.{layer}.outputs"):
            if name not in kept or kept[name].shape[1:] != (hidden_size,):
                found = f"of shape {list(kept[name].shape)}" if name in kept else "missing"
                raise UsageError(
                    f"{next(iter(kept.values())).shard}: '{name}' is {found}, but layer {layer} of '{checkpoint.name}' "
                    f"takes inputs of {hidden_size} numbers; give the statistics of this model"
                )


def _check_saliency(checkpoint: Checkpoint, opened: SaliencyFile) -> None:
    moe = checkpoint.description
    found = (opened.layers, *opened.shape)
    if found != (moe.layers, moe.experts, moe.expert_width):
        raise UsageError(
            f"{opened.path}: is of {len(found[0])} layers of {found[1]} experts, {found[2]} neurons wide, but "
            f"'{checkpoint.name}' has {len(moe.layers)} of {moe.experts}, {moe.expert_width} wide; give the "
            "statistics of this model"
        )
