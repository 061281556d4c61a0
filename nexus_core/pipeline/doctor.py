"""Looks a model over: are its weights whole and numbers, does it read text, how fast is it here, and so how long will
a recipe take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nexus_core.additions import additions, as_teacher
from nexus_core.checkpoint.fingerprint import fingerprint
from nexus_core.checkpoint.reader import TensorEntry, read_tensor
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.documents import documents
from nexus_core.data.isolation import isolates_documents, position_arguments
from nexus_core.data.packing import PackedSequences, pack
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.errors import CheckpointError, DataError
from nexus_core.measure.perplexity import Perplexity, perplexity
from nexus_core.models import compute_dtype, load
from nexus_core.pipeline.rehearsal import Pace, Rehearsal, random_sequences, repeated
from nexus_core.plugins import installed
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Collect, Recipe, Source
from nexus_core.recipe.training import Train
from nexus_core.stages.convert import check_experts
from nexus_core.train.passes import final_hidden, output_head

# Read at once while looking for numbers that are none.
PART_BYTES = 64 * 2**20

SEQUENCES = 8
STEPS = 2

# Without a recipe: enough on a CPU to tell its speed in seconds; a GPU must have enough to do.
RECIPELESS_LENGTH = {"cpu": 256, "cuda": 1024}

Say = Callable[[str], None]


@dataclass
class Report:
    """What was found. perplexity: of the base and, with additions, of the student. tokens: of each stage, for the
    hours; backends: which implementation did which part of the work, as far as the family tells.
    """

    model: str
    fingerprint: str = ""
    tensors: int = 0
    read_bytes: int = 0
    text: str = ""
    perplexity: dict[str, float] = field(default_factory=dict)
    vocabulary_size: int = 0
    paces: dict[str, Pace] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def hours(self) -> dict[str, float]:
        """Projected, by stage."""
        return {stage: self.tokens[stage] / pace.tokens_per_second / 3600 for stage, pace in self.paces.items()}

    @property
    def verdict(self) -> str:
        """One line."""
        if self.warnings:
            return f"usable, but {'; '.join(self.warnings)}"
        return "sound: every tensor is there and a number, it reads text, and every stage runs"


def examine(
    checkpoint: Checkpoint,
    *,
    sources: Sequence[Source] = (),
    recipe: Recipe | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    verify: bool = True,
    say: Say = lambda line: None,
) -> Report:
    """Look a model over. sources: text to read, by default what comes with NEXUS. recipe: whose sizes are rehearsed and
    whose tokens the hours are for; the defaults' without one. verify: read every byte, not samples.

    say: called with a line about each thing found. Raises CheckpointError with what is wrong if the model is unusable.
    """
    report = Report(checkpoint.name, vocabulary_size=checkpoint.description.vocabulary_size)
    kind = torch.device(device).type
    length = recipe.train.sequence_length if recipe else RECIPELESS_LENGTH.get(kind, RECIPELESS_LENGTH["cpu"])
    # First: it takes a moment, and reading every byte of a large model takes minutes.
    packed = _text(checkpoint, sources, length, report)
    _weights(checkpoint, report, verify=verify, say=say)
    model = load(checkpoint, dtype=compute_dtype(dtype, device), device=device)
    say("model    loaded strictly: no tensor missing, unknown or of another shape")
    _read_text(model, packed, report, say=say)
    _rehearse(checkpoint, model, packed, recipe, report, say=say)
    report.backends = _backends(checkpoint)
    for part, name in report.backends.items():
        say(f"backend  {part}: {name}")
    return report


def _weights(checkpoint: Checkpoint, report: Report, *, verify: bool, say: Say) -> None:
    entries = checkpoint.reader.entries
    check_experts(checkpoint)
    report.fingerprint = fingerprint(checkpoint.folder, verify=verify)
    report.tensors = len(entries)
    say(f"names    {len(entries):,} tensors in {len(checkpoint.reader.shards)} shards, all routed experts among them")
    say(f"content  fingerprint {report.fingerprint[:16]}{'' if verify else ', from samples'}")
    if verify:
        with Progress("doctor", sum(entry.stored_bytes for entry in entries.values()), "bytes") as progress:
            for entry in entries.values():
                refuse_unless_numbers(checkpoint, entry)
                report.read_bytes += entry.stored_bytes
                progress.advance(entry.stored_bytes)
        say(f"numbers  {report.read_bytes:,} bytes read: none stands for not-a-number or infinity")


def refuse_unless_numbers(checkpoint: Checkpoint, entry: TensorEntry) -> None:
    """Raises CheckpointError, naming the tensor and the first place, if something in it is not a finite number.

    What a family packs it knows itself; of all else core sees it.
    """
    hook = checkpoint.family.hook
    for index in _slices(entry):
        tensor = read_tensor(entry, index)
        fault = hook.nexus_number_fault(config=checkpoint.config, name=entry.name, tensor=tensor)
        if fault:
            place = "" if index is None else f"[{index}]"
            raise CheckpointError(f"{entry.shard}: tensor '{entry.name}'{place} {fault}; copy or download it again")


def _slices(entry: TensorEntry) -> Sequence[int | None]:
    """Indices of the first dimension if the whole is too large to be read at once."""
    return [None] if entry.stored_bytes <= PART_BYTES or len(entry.shape) < 2 else range(entry.shape[0])


def _text(checkpoint: Checkpoint, sources: Sequence[Source], length: int, report: Report) -> PackedSequences:
    """Sequences of the given text, or of what NEXUS brings; of random tokens if the model has no tokenizer."""
    given = list(sources) or [
        Source(path=f"embedded:{file.name}") for file in installed().embedded().values() if file.kind == "data"
    ]
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
        limit = SEQUENCES * length
        found = documents(given, "all", tokenizer, limit_tokens=limit)
        packed = pack(found, length, end_token=end_token_id(tokenizer), limit_tokens=limit)
    except (CheckpointError, DataError) as error:
        if sources:
            raise
        report.warnings.append(f"it was read random tokens, not text: {error}")
        return random_sequences(checkpoint.description.vocabulary_size, SEQUENCES, length)
    report.text = ", ".join(source.path for source in given)
    return packed


@torch.no_grad()
def _read_text(model: Any, packed: PackedSequences, report: Report, *, say: Say) -> None:
    """Perplexity of the base and of the student, and what is wrong with it."""
    report.perplexity["base"] = _perplexity(model, packed, as_base=True)
    if additions(model):
        report.perplexity["student"] = _perplexity(model, packed, as_base=False)
    told = ", ".join(f"{name} {value:,.2f}" for name, value in report.perplexity.items())
    say(f"text     perplexity {told} over {packed.tokens:,} tokens of {report.text or 'random tokens'}")
    for name, value in report.perplexity.items():
        if not math.isfinite(value):
            raise CheckpointError(f"{report.model}: its {name}'s perplexity is {value}: the weights are damaged")
        if report.text and value > report.vocabulary_size:
            report.warnings.append(
                f"its {name}'s perplexity of {value:,.0f} is worse than guessing among {report.vocabulary_size:,} "
                "tokens, as an untrained model's"
            )


def _perplexity(model: Any, packed: PackedSequences, *, as_base: bool) -> float:
    device, isolates, head = next(model.parameters()).device, isolates_documents(model), output_head(model)
    total = Perplexity()
    for row in range(len(packed)):
        inputs = {
            "input_ids": packed.input_ids[row, None],
            **position_arguments(isolates, packed.positions[row, None]),
        }
        placed = {name: tensor.to(device) for name, tensor in inputs.items()}
        if as_base:
            with as_teacher(model):
                hidden_TD = final_hidden(model, placed)
        else:
            hidden_TD = final_hidden(model, placed)
        total = total + perplexity(hidden_TD, packed.targets[row].to(device), head)
    return total.perplexity


def _rehearse(
    checkpoint: Checkpoint, model: Any, packed: PackedSequences, recipe: Recipe | None, report: Report, *, say: Say
) -> None:
    train, collect = (recipe.train, recipe.collect) if recipe else (Train(), Collect())
    report.tokens = {
        "collect": collect.tokens,
        "capture": train.max_steps * train.gradient_accumulation * train.batch_size * train.sequence_length,
    }
    report.tokens["train"] = report.tokens["capture"]
    rehearsal = Rehearsal(checkpoint, model, repeated(packed, train.batch_size * (STEPS + 1)), train.batch_size, STEPS)
    width = recipe.convert.width if recipe else None
    recomputes = train.recomputes_on(next(model.parameters()).device.type)
    stages: Mapping[str, Callable[[], Pace]] = {
        "collect": rehearsal.collect,
        "capture": lambda: rehearsal.capture(train),
        "train": lambda: rehearsal.train(recomputes=recomputes, width=width),
    }
    for stage, run in stages.items():
        pace = run()
        report.paces[stage] = pace
        say(
            f"{stage:<8} {pace.tokens_per_second:,.0f} tokens/s in micro-batches of {train.batch_size} x "
            f"{packed.input_ids.shape[1]}: {report.hours[stage]:,.2f} h for {report.tokens[stage]:,} tokens"
        )


def _backends(checkpoint: Checkpoint) -> dict[str, str]:
    return dict(checkpoint.family.hook.nexus_backends())
