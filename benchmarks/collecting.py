"""What gathering router statistics costs a model's own forward pass, on the embedded model."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from functools import partial

import torch

from benchmarks.measurement import Measurement
from nexus_core.additions import as_teacher
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.data.isolation import isolates_documents, position_arguments
from nexus_core.data.samples import draw
from nexus_core.models import load
from nexus_core.recipe.schema import Collect, Source
from nexus_core.stages.router_pass import RoutedBatch, RouterPass, batches
from nexus_core.statistics.kept_inputs import KeptInputs
from nexus_core.statistics.listening import listen
from nexus_core.statistics.moments import RouterStatistics

SETTINGS = Collect(tokens=16_384, sequence_length=512, batch_size=8)
ROUNDS = 15


def run() -> list[Measurement]:
    """CPU time of single batches, in turn, so that other work on the machine counts for neither."""
    checkpoint = open_checkpoint("embedded:tiny-gpt-oss")
    sets = {name: [Source(path=f"embedded:{name}")] for name in ("prose", "code")}
    work = batches(draw(checkpoint, sets, dict.fromkeys(sets, 0.5), SETTINGS, "all"), SETTINGS.batch_size)
    model = load(checkpoint, dtype=torch.float32)
    moe = checkpoint.description
    isolates = isolates_documents(model)

    @torch.inference_mode()
    def plain(batch: RoutedBatch) -> None:
        model.base_model(input_ids=batch.input_ids, use_cache=False, **position_arguments(isolates, batch.positions))

    def collecting(batch: RoutedBatch, keep_inputs: int) -> None:
        kept = KeptInputs(moe.layers, SETTINGS.tokens, keep_inputs)
        with ExitStack() as stack:
            listener = stack.enter_context(listen(model, checkpoint.family, keep_inputs=keep_inputs > 0))
            passes[keep_inputs].listener, passes[keep_inputs].kept = listener, kept
            passes[keep_inputs].route(batch)

    passes = {}
    for keep_inputs in (0, SETTINGS.keep_inputs):
        with as_teacher(model), listen(model, checkpoint.family) as listener:
            sums, kept = RouterStatistics.zeros(moe.layers, moe.experts), KeptInputs(moe.layers, SETTINGS.tokens, 0)
            passes[keep_inputs] = RouterPass(model, listener, sums, kept)
    with listen(model, checkpoint.family) as heard:
        plain(work[0])

    def adding_up(batch: RoutedBatch) -> None:
        for position, layer in enumerate(moe.layers):
            passes[0].statistics.update(position, heard.routers[layer])

    subjects = {
        "the layers alone": plain,
        "adding up what was heard, alone": adding_up,
        "nexus, all statistics": partial(collecting, keep_inputs=0),
        f"nexus, and {SETTINGS.keep_inputs} inputs a layer": partial(collecting, keep_inputs=SETTINGS.keep_inputs),
    }
    against = next(iter(subjects))
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(ROUNDS + 1):
        batch = work[number % len(work)]
        for name, subject in subjects.items():
            started = time.process_time()
            subject(batch)
            if number:  # the first round warms caches up
                seconds[name].append(time.process_time() - started)
    return [
        Measurement(
            f"collecting over the embedded model ({len(moe.layers)} layers, {moe.experts} experts), CPU time of "
            f"{SETTINGS.batch_size} x {SETTINGS.sequence_length} tokens",
            name,
            statistics.median(times),
            statistics.median(time / base for time, base in zip(times, seconds[against], strict=True)),
            against,
            f"{1e6 * statistics.median(times) / work[0].tokens:.1f} us a token",
        )
        for name, times in seconds.items()
    ]
