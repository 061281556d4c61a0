"""A base checkpoint and a selection to a checkpoint with one shared expert per layer, without building the model."""

# N inputs, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexus_core.checkpoint.links import CONFIG_NAME, TOKENIZER_NAMES, copy_companions, link_shards
from nexus_core.checkpoint.reader import read_header
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.checkpoint.writer import ShardWriter, TensorPlan, shard_writer, write_index, write_json
from nexus_core.errors import CheckpointError, UsageError
from nexus_core.merge import (
    Effect,
    LayerExperts,
    apply_start,
    check_merged,
    expert_output,
    measure_effect,
    start_factor,
)
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Convert, Recipe
from nexus_core.report.conversion import output_change
from nexus_core.select.selection import FILE_NAME as SELECTION_NAME
from nexus_core.select.selection import LayerSelection, Selection, check_selection, read_selection
from nexus_core.stages.merge_sources import check_needs, open_sources, request
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.strategies import choose_strategy
from nexus_core.statistics.kept_inputs import FILE_NAME as MOE_INPUTS_NAME
from nexus_core.statistics.saliency import FILE_NAME as SALIENCY_NAME
from nexus_core.statistics.saliency import NEED
from nexus_core.types import ExpertWeights, MoeDescription

SHARED_EXPERTS_NAME = "nexus_shared_experts.safetensors"
REPORT_NAME = "convert_report.json"
PICTURE_NAME = "output_change.png"


def convert(
    checkpoint: Checkpoint,
    selection: Selection,
    settings: Convert,
    out: Path,
    *,
    moe_inputs: Path | None = None,
    neuron_saliency: Path | None = None,
    learn: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    selection_file: str = SELECTION_NAME,
) -> Metrics:
    """Write a checkpoint whose every MoE layer has a shared expert merged from the layer's own experts.

    Memory is that of a few experts, however many layers there are: experts are read a part at a time, and a layer is on
    the disk before the next begins. The base's shards are linked, not rewritten. Everything that can be known to be
    wrong is found before anything is written.

    out: an empty folder; it becomes a model folder with a `convert_report.json` and a picture of it. moe_inputs: what
    collect kept of the layers' inputs and outputs; without it the report does not tell what the start does to them.
    neuron_saliency: what collect gathered of the neurons, for strategies that need it. learn, keep: names of the data
    sets that are to be learnt and kept; left out, the only set that there is, and all others. selection_file: where the
    selection came from, for errors. Raises CheckpointError if the base is incomplete or already converted,
    SelectionError if the selection is another model's, UsageError if the merge cannot be made of what there is.
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
    width = settings.width or moe.expert_width
    plan = _plan(checkpoint, width)
    dtype = next(iter(plan.values())).dtype
    # Saliency that the strategy does not read need not be whole, nor tell which sets are which.
    needs_saliency = NEED in strategy.needs
    sources = open_sources(checkpoint, dtype, moe_inputs, neuron_saliency if needs_saliency else None, learn, keep)
    check_needs(strategy, sources)
    chosen = min(len(layer.experts) for layer in selection.layers)
    refusal = strategy.refuses and strategy.refuses(request(strategy, width, chosen, sources), parameters)
    if refusal:
        raise UsageError(f"{refusal.key} {refusal.message}")

    def build(layer: LayerSelection) -> Effect | None:
        # A function, so that a layer's expert is gone before the next one is built.
        experts = sources.layer(layer.layer)
        merged = strategy.function(experts, layer, width, parameters, _generator(settings.seed, layer.layer))
        check_merged(merged, strategy.name, width, moe.hidden_size)
        effect = _effect(experts, merged, sources.outputs(layer.layer))
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

    sizes: Metrics = {
        "trainable_parameters": sum(torch.Size(tensor.shape).numel() for tensor in plan.values()),
        "bytes_before": bytes_after - sum(tensor.stored_bytes for tensor in plan.values()),
        "bytes_after": bytes_after,
    }
    report = {
        "merge": settings.merge,
        "parameters": parameters.model_dump(mode="json") if parameters else {},
        "start": settings.start,
        "width": width,
        "selection": {"strategy": selection.strategy, "top_k": selection.top_k},
        **sizes,
        "base_shards": link,
        "copied": copied,
        "left_out": _left_out(bool(sources.kept), copied),
        "layers": [_layer_report(layer, effects[layer.layer], factor) for layer in selection.layers],
    }
    if sources.saliency:
        report["data"] = {"learnt": list(sources.learnt), "kept": list(sources.kept_sets)}
    write_json(out / REPORT_NAME, report)
    measured = {layer: effect for layer, effect in effects.items() if effect}
    if not measured:
        return sizes
    output_change(measured, settings.merge, factor).savefig(out / PICTURE_NAME)
    return sizes | _mean_effect(list(measured.values()), factor)


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


def _effect(experts: LayerExperts, merged: ExpertWeights, outputs_ND: torch.Tensor | None) -> Effect | None:
    """What the merged expert, at full start, would add to its layer's output on the kept inputs."""
    if experts.inputs_ND is None or outputs_ND is None:
        return None
    return measure_effect(expert_output(merged, experts.inputs_ND, experts.activations), outputs_ND)


def _mean_effect(effects: Sequence[Effect], factor: float) -> Metrics:
    full = float(np.mean([effect.relative_change for effect in effects]))
    return {
        "relative_output_change": abs(factor) * full,
        "relative_output_change_at_full_start": full,
        "cosine_to_routed_output": float(np.mean([effect.cosine for effect in effects])),
    }


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


def _sets(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Names of the data sets that statistics are collected over: those to be learnt, and those to be kept."""
    collected = recipe.collect.data or recipe.data
    learnt, kept = ([name for name in names if name in collected] for names in (recipe.learnt_sets, recipe.kept_sets))
    return learnt, kept


def _settings(recipe: Recipe) -> dict[str, object]:
    section = recipe.convert
    settings: dict[str, object] = section.model_dump(mode="json")
    strategy, _ = choose_strategy("merge", section.merge, section.parameters)
    if NEED in strategy.needs:
        settings["learn"], settings["keep"] = _sets(recipe)
    return settings


def _run(context: StageContext) -> Metrics:
    selection_file = context.inputs["select"] / SELECTION_NAME
    found = {name: context.inputs["collect"] / name for name in (MOE_INPUTS_NAME, SALIENCY_NAME)}
    learn, keep = _sets(context.recipe)
    return convert(
        context.checkpoint,
        read_selection(selection_file),
        context.recipe.convert,
        context.out,
        moe_inputs=found[MOE_INPUTS_NAME] if found[MOE_INPUTS_NAME].is_file() else None,
        neuron_saliency=found[SALIENCY_NAME] if found[SALIENCY_NAME].is_file() else None,
        learn=learn,
        keep=keep,
        selection_file=str(selection_file),
    )


STAGE = Stage(name="convert", version=3, inputs=("select", "collect"), settings=_settings, run=_run)
