"""Small converted checkpoints, their text, and the settings of short training runs, for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from gpt_oss_checkpoints import write_tiny_checkpoint

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.mixture import Batch
from nexus_core.recipe.schema import Convert, Source
from nexus_core.recipe.training import Train
from nexus_core.select.selection import LayerSelection, Selection
from nexus_core.stages.convert import convert

VOCABULARY = 320


def write_converted(folder: Path, *, start: str | float = "zero") -> Checkpoint:
    """A tiny random base in `folder`/base and, in `folder`/converted, the same with shared experts."""
    base = open_checkpoint(write_tiny_checkpoint(folder / "base", vocabulary=VOCABULARY, tokenizer=True))
    selection = Selection(
        strategy="random",
        top_k=2,
        layers=tuple(LayerSelection(layer=layer, experts=(0, 3)) for layer in base.description.layers),
    )
    converted = folder / "converted"
    converted.mkdir()
    convert(base, selection, Convert.model_validate({"start": start}), converted)
    return open_checkpoint(converted)


def write_texts(folder: Path, records: int = 60) -> dict[str, list[Source]]:
    """Two data sets of nonsense, `domain` and `general`, that differ in their letters."""
    generator = random.Random(0)
    sources = {}
    for name, letters in (("domain", "0123456789+=. "), ("general", "abcdefghij klmno ")):
        file = folder / f"{name}.jsonl"
        lines = ["".join(generator.choices(letters, k=120)) for _ in range(records)]
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        sources[name] = [Source(path=str(file), held_out=0.3)]
    return sources


def train_settings(**changes: Any) -> Train:
    """A run of a few short steps in which two thirds of the rows are learnt."""
    settings: dict[str, Any] = {
        "data": {"domain": 2.0, "general": 1.0},
        "max_steps": 4,
        "sequence_length": 24,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1.0e-3,
        "checkpoint_every": 2,
    }
    return Train.model_validate(settings | changes)


class RandomBatches:
    """Random tokens; of every three rows two are of the set `domain` and one of `general`; some targets don't count."""

    def __init__(self, batch_size: int = 2, sequence_length: int = 24, seed: int = 0):
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed

    def batch(self, index: int) -> Batch:
        rows = [self._row(index * self.batch_size + row) for row in range(self.batch_size)]
        input_ids, targets, lengths, names = zip(*rows, strict=True)
        positions = torch.arange(self.sequence_length).expand(self.batch_size, -1)
        return Batch(torch.stack(input_ids), torch.stack(targets), positions, torch.tensor(lengths), list(names))

    def _row(self, number: int) -> tuple[torch.Tensor, torch.Tensor, int, str]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        tokens = torch.randint(0, VOCABULARY, (self.sequence_length + 1,), generator=generator)
        length = int(torch.randint(self.sequence_length // 2, self.sequence_length + 1, (), generator=generator))
        targets = tokens[1:].clone()
        targets[: int(torch.randint(1, 6, (), generator=generator))] = -100
        targets[length:] = -100
        return tokens[:-1], targets, length, "general" if number % 3 == 2 else "domain"
