"""A base checkpoint and a selection to a checkpoint with one shared expert per layer, without building the model."""

# N inputs, D hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexus_core.checkpoint.links import CONFIG_NAME, TOKENIZER_NAMES, copy_companions, link_shards
from nexus_core.checkpoint.reader import TensorEntry, read_header, read_tensor
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.checkpoint.writer import ShardWriter, TensorPlan, shard_writer, write_index, write_json
from nexus_core.errors import CheckpointError, UsageError
from nexus_core.merge import Effect, apply_start, expert_output, measure_effect, start_factor
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Convert, Recipe
from nexus_core.select.selection import FILE_NAME, LayerSelection, Selection, check_selection, read_selection
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.strategies import choose_strategy
from nexus_core.types import ExpertWeights, MoeDescription

SHARED_EXPERTS_NAME = "nexus_shared_experts.safetensors"
MOE_INPUTS_NAME = "moe_inputs.safetensors"
REPORT_NAME = "convert_report.json"


def convert(
    checkpoint: Checkpoint,
    selection: Selection,
    settings: Convert,
    out: Path,
    *,
    moe_inputs: Path | None = None,
    selection_file: str = FILE_NAME,
) -> Metrics:
    """Write a checkpoint whose every MoE layer has a shared expert merged from the selected experts.

    Memory is that of a few experts, however many layers there are: experts are read one at a time, and a layer is on
    the disk before the next begins. The base's shards are linked, not rewritten. Everything that can be known to be
    wrong is found before anything is written.

    out: an empty folder; it becomes a model folder with a `convert_report.json`. moe_inputs: what collect kept of the
    layers' inputs and outputs; without it the report does not tell what the start does to them. selection_file: where
    the selection came from, for errors. Raises CheckpointError if the base is incomplete or already converted,
    SelectionError if the selection is another model's.
    """
    moe = checkpoint.description
    if moe.shared_expert_width:
        raise CheckpointError(
            f"{checkpoint.name}: has shared experts already, of width {moe.shared_expert_width}; convert its base model"
        )
    factor = start_factor(settings.start)
    strategy, parameters = choose_strategy("merge", settings.merge, settings.parameters)
    check_selection(selection, moe.layers, moe.experts, selection_file, checkpoint.name)
    check_experts(checkpoint)
    kept_inputs = read_header(moe_inputs) if moe_inputs else {}
    width = settings.width or moe.expert_width
    plan = _plan(checkpoint, width)

    def build(layer: LayerSelection) -> Effect | None:
        # A function, so that a layer's expert is gone before the next one is built.
        read, generator = _ExpertReader(checkpoint, layer.layer), _generator(settings.seed, layer.layer)
        merged = strategy.function(read, layer, width, parameters, generator)
        effect = _effect(checkpoint, merged, kept_inputs, layer.layer) if kept_inputs else None
        _write(shard, checkpoint, layer.layer, apply_start(merged, factor))
        return effect

    with (
        shard_writer(out / SHARED_EXPERTS_NAME, plan) as shard,
        Progress("convert", len(selection.layers), "layers") as progress,
    ):
        effects = {layer.layer: build(layer) for layer in progress.track(selection.layers)}

    link, base_entries = link_shards(checkpoint.reader, out)
    bytes_after = write_index(out, [*base_entries, *read_header(out / SHARED_EXPERTS_NAME).values()])
    write_json(out / CONFIG_NAME, checkpoint.family.hook.nexus_converted_config(config=checkpoint.config, width=width))
    copied = copy_companions(checkpoint.folder, out, [REPORT_NAME])

    trainable = sum(torch.Size(tensor.shape).numel() for tensor in plan.values())
    shared_bytes = sum(tensor.stored_bytes for tensor in plan.values())
    report = {
        "merge": settings.merge,
        "parameters": parameters.model_dump(mode="json") if parameters else {},
        "start": settings.start,
        "width": width,
        "selection": {"strategy": selection.strategy, "top_k": selection.top_k},
        "trainable_parameters": trainable,
        "bytes_before": bytes_after - shared_bytes,
        "bytes_after": bytes_after,
        "base_shards": link,
        "copied": copied,
        "left_out": _left_out(bool(kept_inputs), copied),
        "layers": [_layer_report(layer, effects[layer.layer], factor) for layer in selection.layers],
    }
    write_json(out / REPORT_NAME, report)
    metrics: Metrics = {
        "trainable_parameters": trainable,
        "bytes_before": bytes_after - shared_bytes,
        "bytes_after": bytes_after,
    }
    measured = [effect for effect in effects.values() if effect]
    if measured:
        full = float(np.mean([effect.relative_change for effect in measured]))
        metrics["relative_output_change"] = abs(factor) * full
        metrics["relative_output_change_at_full_start"] = full
        metrics["cosine_to_routed_output"] = float(np.mean([effect.cosine for effect in measured]))
    return metrics


def check_experts(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, naming the first that is missing, unless all tensors of all routed experts are there."""
    entries = checkpoint.reader.entries
    for location in checkpoint.family.hook.nexus_enumerate_experts(config=checkpoint.config):
        for part in location.parts:
            whose = f"layer {location.layer}, expert {location.expert}"
            if part.name not in entries:
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{part.name}' ({whose}) is in no shard; copy or download it again"
                )
            shape = entries[part.name].shape
            if part.index is not None and part.index >= (shape[0] if shape else 0):
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor '{part.name}' {list(shape)} has no part for {whose}, which "
                    "config.json says there is; copy or download the checkpoint again"
                )


@dataclass
class _ExpertReader:
    """What a merge strategy calls to get an expert, in the checkpoint's own type: MXFP4 and bfloat16 both fit it."""

    checkpoint: Checkpoint
    layer: int

    def __call__(self, expert: int) -> ExpertWeights:
        source = self.checkpoint
        return source.family.hook.nexus_read_expert(
            reader=source.reader, config=source.config, layer=self.layer, expert=expert, dtype=source.dtype
        )


def _plan(checkpoint: Checkpoint, width: int) -> dict[str, TensorPlan]:
    """The tensors of all shared experts, by name, from the config alone."""
    moe = checkpoint.description
    blank = _blank_expert(moe, width)
    return {
        name: TensorPlan.of(tensor)
        for layer in moe.layers
        for name, tensor in checkpoint.family.hook.nexus_shared_expert_tensors(
            config=checkpoint.config, layer=layer, weights=blank
        ).items()
    }


def _blank_expert(moe: MoeDescription, width: int) -> ExpertWeights:
    def blank(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    D = moe.hidden_size
    weights = ExpertWeights(gate=blank(width, D), up=blank(width, D), down=blank(D, width))
    if moe.has_expert_biases:
        weights.gate_bias, weights.up_bias, weights.down_bias = blank(width), blank(width), blank(D)
    return weights


def _write(shard: ShardWriter, checkpoint: Checkpoint, layer: int, weights: ExpertWeights) -> None:
    tensors = checkpoint.family.hook.nexus_shared_expert_tensors(config=checkpoint.config, layer=layer, weights=weights)
    for name, tensor in tensors.items():
        shard.write(name, tensor)


def _generator(seed: int, layer: int) -> torch.Generator:
    # One per layer, so that what is drawn for one does not depend on which others there are.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, layer]).generate_state(1)[0]))


def _effect(checkpoint: Checkpoint, merged: ExpertWeights, kept: Mapping[str, TensorEntry], layer: int) -> Effect:
    """What the merged expert, at full start, would add to its layer's output on the kept inputs."""
    names = [f"layers.{layer}.{part}" for part in ("inputs", "outputs")]
    hidden_size = checkpoint.description.hidden_size
    for name in names:
        if name not in kept or kept[name].shape[1:] != (hidden_size,):
            found = f"of shape {list(kept[name].shape)}" if name in kept else "missing"
            file = next(iter(kept.values())).shard
            raise UsageError(
                f"{file}: '{name}' is {found}, but layer {layer} of '{checkpoint.name}' takes inputs of {hidden_size} "
                "numbers; give the statistics of this model"
            )
    inputs_ND, outputs_ND = (read_tensor(kept[name]).float() for name in names)

    def activations(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return checkpoint.family.hook.nexus_neuron_activations(config=checkpoint.config, gate=gate, up=up)

    return measure_effect(expert_output(merged, inputs_ND, activations), outputs_ND)


def _layer_report(layer: LayerSelection, effect: Effect | None, factor: float) -> dict[str, Any]:
    """relative_output_change: ||shared(x)|| / ||routed(x)|| over the kept inputs as converted; 0 for a zero start."""
    report: dict[str, Any] = {"layer": layer.layer, "experts": list(layer.experts)}
    if effect:
        report["relative_output_change"] = abs(factor) * effect.relative_change
        report["at_full_start"] = asdict(effect)
    return report


def _left_out(has_inputs: bool, copied: list[str]) -> list[str]:
    """What convert could not do, in sentences."""
    left_out = []
    if not has_inputs:
        left_out.append(
            f"relative output change: there is no {MOE_INPUTS_NAME} (collect keeps it unless keep_inputs is 0); give "
            "--statistics"
        )
    if not any(name in copied for name in TOKENIZER_NAMES):
        left_out.append("tokenizer: the base has none; copy its files into the folder to chat or to train on text")
    return left_out


def _settings(recipe: Recipe) -> dict[str, object]:
    return recipe.convert.model_dump(mode="json")


def _run(context: StageContext) -> Metrics:
    selection_file = context.inputs["select"] / FILE_NAME
    kept_inputs = context.inputs["collect"] / MOE_INPUTS_NAME
    return convert(
        context.checkpoint,
        read_selection(selection_file),
        context.recipe.convert,
        context.out,
        moe_inputs=kept_inputs if kept_inputs.is_file() else None,
        selection_file=str(selection_file),
    )


STAGE = Stage(name="convert", version=1, inputs=("select", "collect"), settings=_settings, run=_run)
