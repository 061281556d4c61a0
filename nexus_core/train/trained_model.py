"""The model at the end of training, as a folder that loads by itself: base shards linked, a new one for the rest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nexus_core.checkpoint.links import copy_companions, link_shards
from nexus_core.checkpoint.reader import DTYPES, CheckpointReader, read_header
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.checkpoint.writer import TensorPlan, shard_writer, write_index, write_json

SHARD_NAME = "nexus_shared_experts.safetensors"

# What stages write about a converted checkpoint; it is not part of the model.
NOT_THE_MODEL = ("stage.json", "convert_report.json", "output_change.png")


def write_trained_model(
    source: Checkpoint, folder: Path, trained: Mapping[str, torch.Tensor], config_changes: Mapping[str, Any]
) -> None:
    """Write `folder`, whole or not at all; an older one of that name is replaced.

    source: the converted checkpoint the training began with. trained: tensors by name, stored in the type they were
    trained in, so that whoever loads the model in that type has the trained function to the bit: float32 after a
    float32 run on a CPU, although the base's own numbers are bfloat16. config_changes: keys of config.json that
    differ from the source's.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    reader = source.reader
    replaced = {reader.entry(name).shard.name for name in trained if name in reader}
    # A shard that holds a trained tensor stays behind; what else is in it moves into the new shard.
    carried = [name for name, entry in reader.entries.items() if entry.shard.name in replaced and name not in trained]
    _, entries = link_shards(reader, partial, left_out=replaced)
    _write_new_shard(partial / SHARD_NAME, trained, reader, carried)
    write_index(partial, [*entries, *read_header(partial / SHARD_NAME).values()])
    write_json(partial / "config.json", {**source.config, **config_changes})
    copy_companions(source.folder, partial, own=NOT_THE_MODEL)
    older = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        # Renamed first: a folder of that name is always whole.
        folder.rename(older)
    partial.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def _write_new_shard(
    path: Path, trained: Mapping[str, torch.Tensor], reader: CheckpointReader, carried: list[str]
) -> None:
    plan = {name: TensorPlan.of(tensor) for name, tensor in trained.items()}
    plan |= {name: TensorPlan(DTYPES[reader.entry(name).dtype], reader.entry(name).shape) for name in carried}
    with shard_writer(path, plan) as writer:
        for name, tensor in trained.items():
            writer.write(name, tensor)
        for name in carried:
            writer.write(name, reader.read(name))


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `after` that `before` does not have, or has otherwise."""
    return {key: value for key, value in after.items() if key not in before or before[key] != value}
