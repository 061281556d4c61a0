"""A teacher's outputs over exactly the text that train will draw, once: what `train.teacher.kind: offline` learns from.

Depends on the teacher and on that text alone, so runs that differ in losses, schedule or routing share it.

    # B sequences, S tokens each, K kept tokens of one sequence, T tokens of its text, L layers, E experts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nexus_core.additions import as_teacher
from nexus_core.checkpoint.fingerprint import base_identity, digest, fingerprint
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.isolation import isolates_documents, position_arguments
from nexus_core.data.packing import IGNORED, PackedSequences
from nexus_core.data.tokenizers import load_tokenizer
from nexus_core.distill import stored_logits, stored_routers
from nexus_core.distill.router_kl import kl_sum
from nexus_core.distill.stored_logits import StorageError, StoredLogits, TopLogits
from nexus_core.distill.stored_routers import StoredRouters
from nexus_core.distill.teachers import log_probabilities
from nexus_core.distill.vocabulary import CHUNK_ELEMENTS
from nexus_core.errors import UsageError
from nexus_core.models import compute_dtype, load
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Recipe, Source
from nexus_core.recipe.training import Train
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.training_text import drawn_sequences, shares_of, training_sequences
from nexus_core.statistics.listening import Listener, listen
from nexus_core.train.passes import final_hidden, output_head
from nexus_core.train.teacher_store import (
    Chunk,
    find_chunk,
    sequences_per_chunk,
    tokens_digest,
    write_chunk,
    write_manifest,
)
from nexus_core.train.trained_model import SHARD_NAME

# Ends of streams of bits are rounded up to bytes, three times a sequence.
ROUNDING_BYTES = 3


def capture(
    student: Checkpoint,
    sets: Mapping[str, Sequence[Source]],
    settings: Train,
    learnt: Collection[str],
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    report: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> Metrics:
    """Store the teacher's next-token distributions on kept text, and its router logits on all text, in `out`.

    student: the model that will be trained, converted or not; its base is the teacher, unless `settings.teacher.path`
    names another model with the same vocabulary. sets, settings, learnt: as train will get them. out: empty, or left by
    an interrupted call with the same arguments, which then goes on. Raises UsageError if the other model has another
    vocabulary, DataError if a set has no text to train on.
    """
    teacher = teacher_checkpoint(student, settings)
    sequences = training_sequences(student.folder, sets, settings)
    model = load(teacher, dtype=compute_dtype(dtype, device), device=device)
    # A larger model of the same tokenizer may have more rows that no token uses.
    vocabulary_size = min(student.description.vocabulary_size, teacher.description.vocabulary_size)
    totals = _Totals()
    chunks: list[Chunk] = []
    length = sequences_per_chunk(settings.sequence_length)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(as_teacher(model))
        reader = _Reader(model, stack.enter_context(listen(model, teacher.family)), settings, vocabulary_size)
        progress = stack.enter_context(Progress("capture", sum(map(len, sequences.values())), "sequences"))
        for name, packed in sequences.items():
            is_kept = name not in learnt
            if not (is_kept or settings.teacher.stores_routers):
                progress.advance(len(packed))
                continue
            for first in range(0, len(packed), length):
                count = min(length, len(packed) - first)
                chunk = find_chunk(out, name, first)
                if chunk is None:
                    measured = _Totals()
                    logits, routers = reader.read(packed, range(first, first + count), is_kept, measured)
                    chunk = write_chunk(out, name, first, logits, routers, measured.sums)
                chunks.append(chunk)
                totals.sums.update(chunk.measured)
                progress.advance(count)
                report(len(chunks), totals.metrics())
    write_manifest(
        out,
        {
            "model": {"name": teacher.name, "identity": identity_of(teacher)},
            "tokenizer": vocabulary_digest(student.folder),
            "vocabulary_size": vocabulary_size,
            "routers": settings.teacher.stores_routers,
            "settings": settings.teacher.model_dump(mode="json"),
            "sets": {
                name: {"sequences": len(packed), "tokens": tokens_digest(packed), "kept": name not in learnt}
                for name, packed in sequences.items()
            },
            "measured": totals.metrics(),
        },
        chunks,
    )
    return {"sequences": sum(map(len, sequences.values())), **totals.metrics(), **_stored(out)}


def teacher_checkpoint(student: Checkpoint, settings: Train) -> Checkpoint:
    """The model to learn from. Raises UsageError if another than the student's base has another vocabulary."""
    if settings.teacher.path is None:
        return student
    teacher = open_checkpoint(settings.teacher.path, settings.teacher.revision)
    if vocabulary_digest(teacher.folder) != vocabulary_digest(student.folder):
        raise UsageError(
            f"train.teacher.path: {teacher.name} has another vocabulary than {student.name}, so their predictions "
            "cannot be compared; name a model of the same tokenizer"
        )
    return teacher


def identity_of(checkpoint: Checkpoint) -> str:
    """What tells a teacher from others, and is the same for a base and for what was converted or trained from it."""
    return base_identity(checkpoint.folder, own_shards=frozenset({SHARD_NAME}))


def vocabulary_digest(folder: Path) -> str:
    """The same for tokenizers that give every token the same id."""
    return digest(load_tokenizer(folder).get_vocab())


class _Reader:
    """Runs the teacher over sequences and gives what is stored of them."""

    def __init__(self, model: Any, listener: Listener, settings: Train, vocabulary_size: int):
        self.model, self.listener, self.settings = model, listener, settings
        self.head = output_head(model).first_tokens(vocabulary_size)
        self.isolates = isolates_documents(model)
        elements = CHUNK_ELEMENTS.get(self.head.weight.device.type, CHUNK_ELEMENTS["cpu"])
        self.rows = max(1, elements // self.head.vocabulary_size)

    def read(
        self, packed: PackedSequences, numbers: range, is_kept: bool, totals: _Totals
    ) -> tuple[list[StoredLogits], list[StoredRouters]]:
        """Of every sequence what is stored of its predictions, if its set is kept, and of its routers, if wanted."""
        tops: list[TopLogits] = []
        routers: list[StoredRouters] = []
        for start in range(numbers.start, numbers.stop, self.settings.batch_size):
            rows = slice(start, min(start + self.settings.batch_size, numbers.stop))
            inputs = {"input_ids": packed.input_ids[rows], **position_arguments(self.isolates, packed.positions[rows])}
            device = self.head.weight.device
            hidden_TD = final_hidden(self.model, {name: tensor.to(device) for name, tensor in inputs.items()})
            if is_kept:
                tops += self._tops(hidden_TD.unflatten(0, inputs["input_ids"].shape), packed.targets[rows])
            if self.settings.teacher.stores_routers:
                routers += self._routers(packed.lengths[rows].tolist(), totals)
        return self._stored(tops, totals) if tops else [], routers

    def _tops(self, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor) -> list[TopLogits]:
        teacher, found = self.settings.teacher, []
        for hidden_SD, targets_S in zip(hidden_BSD, targets_BS, strict=True):
            hidden_KD = hidden_SD[(targets_S != IGNORED).to(hidden_SD.device)]
            parts = [
                stored_logits.choose(
                    log_probabilities(hidden_CD, self.head, 1.0), limit=teacher.top_logits, tail=teacher.tail
                )
                for hidden_CD in hidden_KD.split(self.rows)
            ]
            found.append(stored_logits.joined(parts))
        return found

    def _stored(self, tops: list[TopLogits], totals: _Totals) -> list[StoredLogits]:
        """Of a chunk's sequences as many ids as there is room for, and what storing them lost."""
        size, ends = self.head.vocabulary_size, [len(top.counts) for top in tops]
        tokens = max(sum(ends), 1)
        room = self.settings.teacher.bytes_per_token - ROUNDING_BYTES * len(tops) / tokens
        fitted = stored_logits.fitted(stored_logits.joined(tops), size, room)
        stored = [stored_logits.encode(part, size) for part in stored_logits.separated(fitted, ends)]
        error = stored_logits.storage_error(fitted, stored_logits.decode(stored, size))
        totals.add_logits(sum(ends), sum(part.stored_bytes for part in stored), error)
        return stored

    def _routers(self, lengths: list[int], totals: _Totals) -> list[StoredRouters]:
        layers = [self.listener.routers[layer].logits.float() for layer in self.listener.layers]
        logits_BSLE = torch.stack(layers, dim=-2).flatten(0, -3).unflatten(0, (len(lengths), -1))
        found = []
        for logits_SLE, length in zip(logits_BSLE, lengths, strict=True):
            stored = stored_routers.encode(logits_SLE[:length])
            back_TLE = stored_routers.decode(stored)
            kl = float(kl_sum(back_TLE.flatten(0, 1), logits_SLE[:length].flatten(0, 1), 1.0)) / len(layers)
            totals.add_routers(length, stored.stored_bytes, kl)
            found.append(StoredRouters(stored.levels.cpu(), stored.steps.cpu()))
        return found


class _Totals:
    """What was stored, and what storing lost: sums over tokens by name, which add up over chunks."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()

    def add_logits(self, tokens: int, stored_bytes: int, error: StorageError) -> None:
        lost = {name: value * tokens for name, value in asdict(error).items()}
        self.sums.update({"kept_tokens": tokens, "logits_bytes": stored_bytes, **lost})

    def add_routers(self, tokens: int, stored_bytes: int, kl_nats: float) -> None:
        self.sums.update({"text_tokens": tokens, "router_bytes": stored_bytes, "router_kl_nats": kl_nats})

    def metrics(self) -> dict[str, float]:
        """Means per token."""
        sums = self.sums
        metrics: dict[str, float] = {}
        if sums["kept_tokens"]:
            names = {
                "logits_bytes": "vocabulary_bytes_per_token",
                "kl_nats": "vocabulary_kl_nats",
                "total_variation": "vocabulary_total_variation",
                "tail": "tail_mass",
                "ids": "ids_per_token",
            }
            metrics |= {"kept_tokens": sums["kept_tokens"]}
            metrics |= {name: sums[part] / sums["kept_tokens"] for part, name in names.items()}
        if sums["text_tokens"]:
            metrics |= {
                "text_tokens": sums["text_tokens"],
                "router_bytes_per_token": sums["router_bytes"] / sums["text_tokens"],
                "stored_router_kl_nats": sums["router_kl_nats"] / sums["text_tokens"],
            }
        return metrics


def _stored(out: Path) -> Metrics:
    return {"bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file())}


def _settings(recipe: Recipe) -> dict[str, Any]:
    train, names = recipe.train, recipe.train.data or recipe.data
    sets = {name: recipe.data[name] for name in names}
    teacher = train.teacher.model_dump(mode="json", exclude={"kind", "path", "revision"})
    if train.teacher.path is not None:
        other = open_checkpoint(train.teacher.path, train.teacher.revision)
        teacher |= {"model": train.teacher.path, "fingerprint": fingerprint(other.folder)}
    return {
        "teacher": teacher,
        "sources": {name: [source.model_dump(mode="json") for source in sources] for name, sources in sets.items()},
        "shares": shares_of(sets, train),
        "learn": list(recipe.learnt_sets),
        "drawn_sequences": drawn_sequences(train),
        "sequence_length": train.sequence_length,
        "seed": train.seed,
    }


def _run(context: StageContext) -> Metrics:
    recipe = context.recipe
    return capture(
        context.checkpoint,
        {name: recipe.data[name] for name in recipe.train.data or recipe.data},
        recipe.train,
        recipe.learnt_sets,
        context.out,
        dtype=recipe.model.dtype,
        device=context.device,
        report=context.report,
    )


STAGE = Stage(
    name="capture",
    version=1,
    inputs=(),
    settings=_settings,
    run=_run,
    resumes=True,
    wanted=lambda recipe: recipe.train.teacher.kind == "offline",
)
