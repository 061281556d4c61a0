"""A teacher's outputs over exactly the text that train will draw, once: what `train.teacher.kind: offline` learns from.

Depends on the teacher and on that text alone, so runs that differ in losses, schedule or routing share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nexus_core.additions import as_teacher
from nexus_core.checkpoint.fingerprint import base_identity, digest, fingerprint
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.packing import PackedSequences
from nexus_core.data.tokenizers import load_tokenizer
from nexus_core.errors import UsageError
from nexus_core.models import compute_dtype, load
from nexus_core.processes import gather, together, world
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Recipe, Source
from nexus_core.recipe.training import Train
from nexus_core.stages.stage import GENERATE, Metrics, Stage, StageContext
from nexus_core.stages.teacher_pass import TeacherPass, Totals
from nexus_core.stages.training_text import drawn_sequences, shares_of, training_sequences
from nexus_core.statistics.listening import listen
from nexus_core.train.teacher_store import (
    Chunk,
    find_chunk,
    sequences_per_chunk,
    tokens_digest,
    write_chunk,
    write_manifest,
)
from nexus_core.train.trained_model import SHARD_NAME


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
    an interrupted call with the same arguments, which then goes on. Several processes share the chunks, and another
    number of them may go on. Raises UsageError if the other model has another vocabulary, DataError if a set has no
    text to train on.
    """
    teacher = teacher_checkpoint(student, settings)
    sequences = training_sequences(student.folder, sets, settings)
    model = load(teacher, dtype=compute_dtype(dtype, device), device=device)
    # A larger model of the same tokenizer may have more rows that no token uses.
    vocabulary_size = min(student.description.vocabulary_size, teacher.description.vocabulary_size)
    here = world()
    totals = Totals()
    ours: list[Chunk] = []
    work = _chunks(sequences, settings, learnt)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(as_teacher(model))
        reader = TeacherPass(model, stack.enter_context(listen(model, teacher.family)), settings, vocabulary_size)
        # Dealt out one by one, so that sets of different costs are shared evenly.
        own = work[here.rank :: here.size]
        progress = stack.enter_context(Progress("capture", sum(len(numbers) for _, numbers in own), "sequences"))
        for name, numbers in own:
            chunk = find_chunk(out, name, numbers.start)
            if chunk is None:
                measured = Totals()
                logits, routers = reader.read(sequences[name], numbers, name not in learnt, measured)
                chunk = write_chunk(out, name, numbers.start, logits, routers, measured.sums)
            ours.append(chunk)
            totals.sums.update(chunk.measured)
            progress.advance(len(numbers))
            report(len(ours), totals.metrics())
    receipts = [Chunk(**receipt) for part in gather([vars(chunk) for chunk in ours]) for receipt in part]
    written = {(chunk.set_name, chunk.first): chunk for chunk in receipts}
    in_order = [written[name, numbers.start] for name, numbers in work]
    about = {
        "model": {"name": teacher.name, "identity": identity_of(teacher)},
        "tokenizer": vocabulary_digest(student.folder),
        "vocabulary_size": vocabulary_size,
        "routers": settings.teacher.stores_routers,
        "settings": settings.teacher.model_dump(mode="json"),
        "sets": {
            name: {"sequences": len(packed), "tokens": tokens_digest(packed), "kept": name not in learnt}
            for name, packed in sequences.items()
        },
    }
    return together(lambda: _finish(out, about, in_order))


def _finish(out: Path, about: Mapping[str, Any], chunks: list[Chunk]) -> Metrics:
    totals = Totals()
    for chunk in chunks:
        totals.sums.update(chunk.measured)
    write_manifest(out, {**about, "measured": totals.metrics()}, chunks)
    stored_bytes = sum(file.stat().st_size for file in out.rglob("[!.]*") if file.is_file())
    sequences = sum(of_set["sequences"] for of_set in about["sets"].values())
    return {"sequences": sequences, **totals.metrics(), "bytes": stored_bytes}


def _chunks(
    sequences: Mapping[str, PackedSequences], settings: Train, learnt: Collection[str]
) -> list[tuple[str, range]]:
    """What is stored, chunk by chunk: the data set and the numbers of its sequences."""
    length = sequences_per_chunk(settings.sequence_length)
    return [
        (name, range(first, min(first + length, len(packed))))
        for name, packed in sequences.items()
        if name not in learnt or settings.teacher.stores_routers
        for first in range(0, len(packed), length)
    ]


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


def _settings(recipe: Recipe) -> dict[str, Any]:
    train = recipe.train
    sets = {name: recipe.data[name] for name in recipe.trained_sets}
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
        {name: context.data[name] for name in recipe.trained_sets},
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
    inputs=(GENERATE,),
    settings=_settings,
    run=_run,
    sets=lambda recipe: recipe.trained_sets,
    resumes=True,
    splits=True,
    runs_model=True,
    wanted=lambda recipe: recipe.train.teacher.kind == "offline",
)
