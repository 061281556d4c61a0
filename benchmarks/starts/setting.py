"""What all trainings share: the model, the text in its order, the teacher's answers, and the held-out text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.starts.experts import hold_dense
from benchmarks.starts.subjects import RETENTION_WEIGHT, Retention
from benchmarks.starts.tool_calls import write_tool_calls
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.isolation import isolates_documents
from nexus_core.data.mixture import TrainingBatches
from nexus_core.data.packing import PackedSequences
from nexus_core.models import load
from nexus_core.recipe.schema import Source
from nexus_core.recipe.training import Evaluate, Loss, Schedule, Train
from nexus_core.stages.train import training_objective
from nexus_core.stages.training_text import held_out_sequences, training_sequences
from nexus_core.statistics.listening import listen
from nexus_core.train.evaluation import HeldOut
from nexus_core.train.passes import MicroBatch, OnlineTeacher, Taught, output_head

MODEL = "embedded:tiny-gpt-oss"
DOMAINS = ("arithmetic", "tool_calls")

# Kept by the KL to the base; measured with it is code, which no training sees.
KEPT, UNSEEN = "prose", "code"

TOOL_CALLS = 3_000


@dataclass(frozen=True)
class Sizes:
    """How long a training is and how much text it is measured on."""

    steps: int = 60
    sequence_length: int = 128
    batch_size: int = 8
    held_out_sequences: int = 40
    collected_tokens: int = 40_000
    candidates: int = 2_000


@dataclass(frozen=True)
class Lesson:
    """One domain in the order that one seed gives it: a micro-batch per step, and what the base says of each.

    isolates: whether the model keeps packed documents apart.
    """

    settings: Train
    isolates: bool
    micro_batches: Sequence[MicroBatch]
    taught: Sequence[Taught]


class Setting:
    """The base model, and the lessons that all subjects get alike. folder: where made-up text goes."""

    def __init__(self, folder: Path, sizes: Sizes, retention: Retention | None = None):
        self.folder, self.sizes, self.retention = folder, sizes, retention or Retention()
        self.checkpoint: Checkpoint = open_checkpoint(MODEL)
        self._lessons: dict[tuple[str, int, int], Lesson] = {}
        self._held_out: dict[str, HeldOut] = {}

    @cached_property
    def sources(self) -> Mapping[str, Sequence[Source]]:
        """Of every set by name."""
        made_up = self.folder / "tool_calls.jsonl"
        write_tool_calls(made_up, TOOL_CALLS)
        embedded = {name: [Source(path=f"embedded:{name}")] for name in ("arithmetic", KEPT, UNSEEN)}
        return embedded | {"tool_calls": [Source(path=str(made_up))]}

    def settings(self, domain: str, seed: int, length: int = 1) -> Train:
        """As the demo's recipe trains, but for length and rate."""
        kept = self.retention
        return Train(
            data={domain: 1 - kept.kept_share, KEPT: kept.kept_share},
            learn=[domain],
            losses={
                "lm": 1.0,
                "router_kl": 1.0,
                "logits_kl": Loss(weight=kept.weight, direction=kept.direction),
            },
            schedule=Schedule(warmup_ratio=0.1, stable_ratio=0.4, temperature=(2.0, 1.0)),
            max_steps=length * self.sizes.steps,
            sequence_length=self.sizes.sequence_length,
            batch_size=self.sizes.batch_size,
            gradient_accumulation=1,
            evaluate=Evaluate(every=self.sizes.steps, sequences=self.sizes.held_out_sequences),
            seed=seed,
        )

    def lesson(self, domain: str, seed: int, length: int = 1) -> Lesson:
        """Tokenized once, taught once. length: how many times as long as a short one."""
        place = domain, seed, length
        if place not in self._lessons:
            # One at a time: the plan goes through them one after the other.
            self._lessons = {place: self._make_lesson(*place)}
        return self._lessons[place]

    def _make_lesson(self, domain: str, seed: int, length: int) -> Lesson:
        settings = self.settings(domain, seed, length)
        sets = {name: self.sources[name] for name in (domain, KEPT)}
        sequences = training_sequences(self.checkpoint.folder, sets, settings)
        batches = TrainingBatches(sequences, settings.data or {}, settings.batch_size, seed)
        model = self.base_model()
        isolates, needs = isolates_documents(model), training_objective(settings).needs
        micro_batches = [
            MicroBatch.of(batches.batch(step), {domain}, "cpu", isolates=isolates) for step in range(settings.max_steps)
        ]
        with listen(model, self.checkpoint.family) as listener:
            teacher = OnlineTeacher(model, listener, output_head(model))
            return Lesson(settings, isolates, micro_batches, [teacher.teach(batch, needs) for batch in micro_batches])

    def base_model(self) -> Any:
        """The untouched model with dense experts."""
        model = load(self.checkpoint, dtype=torch.float32)
        hold_dense(model)
        return model

    def held_out(self, domain: str) -> HeldOut:
        """Measures the domain, the kept set and the unseen one; the base once for all trainings."""
        if domain not in self._held_out:
            names = (domain, KEPT, UNSEEN)
            sets: Mapping[str, PackedSequences] = held_out_sequences(
                self.checkpoint.folder, {name: self.sources[name] for name in names}, self.settings(domain, 0)
            )
            held_out = HeldOut(sets, 16, [domain], RETENTION_WEIGHT)
            # Now, because it takes a model's base for the model without additions, which LoRA is not one of.
            model = self.base_model()
            held_out.measure(model, output_head(model), isolates=isolates_documents(model))
            self._held_out[domain] = held_out
        return self._held_out[domain]


class Recorded:
    """A teacher that answers what it answered before, whatever model is trained: a TeacherSource."""

    def __init__(self, taught: Taught):
        self._taught = taught

    def teach(self, micro_batch: MicroBatch, needs: Collection[str]) -> Taught:
        return self._taught
