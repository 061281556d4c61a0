"""What can be known before anything runs: whether model, data and recipe fit, and about what it will take.

The estimates are sums that anyone can redo on paper, and leave out what cannot be known: activations, and what the
libraries themselves need.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.records import check_source
from nexus_core.distill.vocabulary import CHUNK_ELEMENTS
from nexus_core.errors import DataError, PluginError, Problem, RecipeError
from nexus_core.recipe.checks import check_against_model
from nexus_core.recipe.schema import Recipe
from nexus_core.types import MoeDescription

# Per trained parameter: float32 weight and gradient, and AdamW's two moments.
TRAINING_BYTES = 16
CHECKPOINT_BYTES = 12
FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Estimate:
    """What a recipe will take: parameters, bytes, and tokens per stage.

    stored_bytes: of the base checkpoint by part. memory_bytes: the model as it is held, plus what training adds,
    plus logits of one chunk of tokens; without activations. disk_bytes: new files in the store.
    """

    trainable_parameters: int
    stored_bytes: Mapping[str, int]
    memory_bytes: int
    disk_bytes: int
    tokens: Mapping[str, int]


def check_inputs(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """See that the recipe fits the model and that all of its data is there. Raises RecipeError with all that is not."""
    problems = check_against_model(recipe, checkpoint.description)
    for name, sources in recipe.data.items():
        for position, source in enumerate(sources):
            where = recipe.location(f"data.{name}.{position}.path")
            try:
                check_source(source, where)
            except DataError as error:
                problems.append(Problem(where, f"data.{name}.{position}", str(error).removeprefix(f"{where}: ")))
    if problems:
        raise RecipeError(problems)


def estimate(recipe: Recipe, checkpoint: Checkpoint) -> Estimate:
    """What the recipe will take with this checkpoint, computed without loading it."""
    description = checkpoint.description
    trainable = shared_expert_parameters(description, recipe.convert.width)
    stored = stored_bytes(checkpoint)
    train, sets = recipe.train, len(recipe.data)
    tokens = {
        "collect": recipe.collect.tokens,
        "train": train.max_steps * train.batch_size * train.gradient_accumulation * train.sequence_length,
        "validate": recipe.validate_.samples * recipe.validate_.sequence_length * sets,
    }
    if train.teacher.kind == "offline":
        tokens["capture"] = tokens["train"]
    # Three buffers as wide as the vocabulary, over a chunk of tokens.
    all_logits = train.batch_size * train.sequence_length * description.vocabulary_size
    logits = 3 * min(all_logits, max(CHUNK_ELEMENTS.values())) * FLOAT32_BYTES
    kept_inputs = 2 * recipe.collect.keep_inputs * len(description.layers) * description.hidden_size * FLOAT32_BYTES
    # The newest checkpoint is written before the oldest goes.
    checkpoints = CHECKPOINT_BYTES * trainable * (train.keep_checkpoints + 1)
    return Estimate(
        trainable_parameters=trainable,
        stored_bytes=stored,
        memory_bytes=sum(stored.values()) + TRAINING_BYTES * trainable + logits,
        disk_bytes=kept_inputs + 2 * BFLOAT16_BYTES * trainable + checkpoints + captured_bytes(recipe, description),
        tokens=tokens,
    )


def captured_bytes(recipe: Recipe, description: MoeDescription) -> int:
    """What a stored teacher takes: distributions of kept text, and router logits, a byte an expert, of all text."""
    train, teacher = recipe.train, recipe.train.teacher
    if teacher.kind == "online":
        return 0
    tokens = train.max_steps * train.batch_size * train.gradient_accumulation * train.sequence_length
    shares = train.data or dict.fromkeys(recipe.data, 1.0)
    kept = sum(shares[name] for name in recipe.kept_sets) / sum(shares.values())
    routers = len(description.layers) * (description.experts + 2) if teacher.stores_routers else 0
    return round(tokens * (kept * teacher.bytes_per_token + routers))


def shared_expert_parameters(description: MoeDescription, width: int | None) -> int:
    """Parameters of one shared expert per layer: gate, up and down, and their biases where the experts have them."""
    hidden, neurons = description.hidden_size, width or description.expert_width
    biases = 2 * neurons + hidden if description.has_expert_biases else 0
    return len(description.layers) * (3 * hidden * neurons + biases)


def stored_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the checkpoint by part, as the family says; in one sum, from the shards, if it does not say."""
    try:
        return dict(checkpoint.family.hook.nexus_stored_bytes(config=checkpoint.config))
    except PluginError:
        return {"tensors": sum(entry.stored_bytes for entry in checkpoint.reader.entries.values())}


def free_disk_bytes(store: Path) -> int:
    """Free bytes where the store is, or would be."""
    place = store.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def device_memory_bytes(device: str) -> int:
    """Memory of the device: a GPU's own, else the machine's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
