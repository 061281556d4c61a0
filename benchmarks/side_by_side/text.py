"""What all contestants train from: the embedded model, converted, a stored teacher, and the very same rows of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.mixture import TrainingBatches
from nexus_core.data.packing import IGNORED
from nexus_core.recipe.schema import Convert, Source
from nexus_core.recipe.training import Train
from nexus_core.select.selection import LayerSelection, Selection
from nexus_core.stages.capture import capture
from nexus_core.stages.convert import convert
from nexus_core.stages.training_text import shares_of, training_sequences

MODEL = "embedded:tiny-gpt-oss"
SETS = {"domain": [Source(path="embedded:arithmetic")], "general": [Source(path="embedded:prose")]}
LEARNT = ["domain"]
BATCH_SIZE, SEQUENCE_LENGTH = 8, 256
TOKENS_PER_STEP = BATCH_SIZE * SEQUENCE_LENGTH
KL_WEIGHT = 4.0
LEARNING_RATE = 1e-3

CONVERTED, TEACHER, ROWS = "converted", "teacher", "rows.safetensors"


def settings(steps: int, **changes: Any) -> Train:
    """Half of the rows learnt, half kept; language-model loss and KL, nothing else."""
    given: dict[str, Any] = {
        "losses": {"lm": 1.0, "logits_kl": KL_WEIGHT},
        "schedule": {"kind": "constant"},
        "learning_rate": LEARNING_RATE,
        "max_steps": steps,
        "sequence_length": SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "gradient_accumulation": 1,
    }
    return Train.model_validate(given | changes)


def prepare(folder: Path, steps: int) -> None:
    """Write all of it into `folder`. Rows as Hugging Face wants them: labels stand where their tokens do."""
    base = open_checkpoint(MODEL)
    converted = _converted(base, folder / CONVERTED)
    offline = settings(steps, teacher={"kind": "offline"})
    (folder / TEACHER).mkdir()
    capture(converted, SETS, offline, LEARNT, folder / TEACHER)
    sequences = training_sequences(converted.folder, SETS, offline)
    batches = TrainingBatches(sequences, shares_of(SETS, offline), BATCH_SIZE, offline.seed)
    drawn = [batches.batch(number) for number in range(steps)]
    input_ids = torch.cat([batch.input_ids for batch in drawn])
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1:] = torch.cat([batch.targets for batch in drawn])[:, :-1]
    is_learnt = torch.tensor([name in LEARNT for batch in drawn for name in batch.set_names])
    save_file({"input_ids": input_ids, "labels": labels, "is_learnt": is_learnt}, folder / ROWS)


def _converted(base: Checkpoint, folder: Path) -> Checkpoint:
    layers = tuple(LayerSelection(layer=layer, experts=(0, 1)) for layer in base.description.layers)
    folder.mkdir()
    convert(base, Selection(strategy="random", top_k=2, layers=layers), Convert(), folder)
    return open_checkpoint(folder)
