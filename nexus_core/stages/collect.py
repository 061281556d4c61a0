"""A model and data to router statistics: which experts the data goes to, exactly, in a few megabytes."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nexus_core import __version__
from nexus_core.additions import as_teacher
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.checkpoint.writer import write_json, write_shard
from nexus_core.data.documents import Part
from nexus_core.data.samples import Sample, choose_shares, draw
from nexus_core.errors import UsageError
from nexus_core.models import compute_dtype, load
from nexus_core.processes import world
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Collect, Recipe, Source
from nexus_core.stages.merge_collected import REPORT_NAME
from nexus_core.stages.parts import forget_parts, in_parts
from nexus_core.stages.router_pass import RoutedBatch, RouterPass, batches
from nexus_core.stages.shards import WHOLE, Shard
from nexus_core.stages.stage import GENERATE, Metrics, Stage, StageContext
from nexus_core.stages.standing import Standing, forget
from nexus_core.stages.strategies import choose_strategy
from nexus_core.statistics import kept_inputs, moments, probabilities
from nexus_core.statistics.activity import ExpertActivity
from nexus_core.statistics.kept_inputs import KeptInputs
from nexus_core.statistics.listening import listen
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.probabilities import ProbabilityWriter
from nexus_core.statistics.saliency import FILE_NAME as SALIENCY_NAME
from nexus_core.statistics.saliency import NEED, NeuronSaliency

# What strategies call the statistics in their `needs` that are gathered only with `expert_norms`.
NEED_EXPERT_NORMS = frozenset({"expert_norms", NEED})

Report = Callable[[int, Mapping[str, float]], None]

log = logging.getLogger(__name__)


def collect(
    checkpoint: Checkpoint,
    sets: Mapping[str, Sequence[Source]],
    settings: Collect,
    out: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    report: Report = lambda step, values: None,
    part: Part = "train",
    shard: Shard = WHOLE,
) -> Metrics:
    """Route `settings.tokens` tokens of the data through the base model and write what its routers did into `out`.

    Of a converted or trained model it is the base in it that is asked. sets: the sources of each data set by name;
    `settings.data` tells their shares; with `settings.expert_norms` a second file tells what neurons do. part: which
    side of each source's split is used. shard: route only a part of the tokens; `merge_collected` makes one of several.
    What an interrupted try left in `out` is gone on with, to the same bits, by the same number of processes; several
    share the batches, which gives the same numbers to rounding in float64. Raises DataError if data is missing or
    unusable, StageError if a router gives numbers that are not finite or memory runs out.
    """
    if shard != WHOLE and not world().alone:
        raise UsageError(f"--shard {shard}: several processes share the tokens by themselves; leave one of the two out")
    shares = choose_shares(settings.data, sets)
    samples = draw(checkpoint, sets, shares, settings, part)
    for sample in samples:
        if sample.shortfall:
            log.warning("%s", sample.shortfall)
    work = batches(samples, settings.batch_size)

    def route(folder: Path, part: Shard) -> Metrics:
        return _route(checkpoint, samples, work, settings, folder, part, device, dtype, report)

    if world().alone:
        metrics = route(out, shard)
    else:
        metrics = in_parts(route, len(work), _identity(work, settings, WHOLE), out)
    if world().is_first:
        # Also of a try with another number of processes.
        forget(out)
        forget_parts(out)
    return metrics


def _route(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    work: Sequence[RoutedBatch],
    settings: Collect,
    out: Path,
    shard: Shard,
    device: str,
    dtype: torch.dtype | None,
    report: Report,
) -> Metrics:
    """Route one part of the batches and write what came of it into `out`."""
    tokens = sum(sample.sequences.tokens for sample in samples)
    first, last = shard.of(len(work))
    passed, ours = (sum(batch.tokens for batch in part) for part in (work[:first], work[first:last]))
    moe = checkpoint.description
    statistics = RouterStatistics.zeros(moe.layers, moe.experts, device, expert_norms=settings.expert_norms)
    kept = KeptInputs(moe.layers, tokens, settings.keep_inputs, passed=passed)
    keep = tokens if settings.keep_probabilities is True else int(settings.keep_probabilities)
    writer = _probability_writer(min(max(keep - passed, 0), ours), checkpoint, out)
    with ExitStack() as stack:
        model = stack.enter_context(as_teacher(load(checkpoint, dtype=dtype, device=device)))
        keeps_inputs = settings.keep_inputs > 0 or settings.expert_norms
        listener = stack.enter_context(listen(model, checkpoint.family, keep_inputs=keeps_inputs))
        activity = _activity(checkpoint, model, samples, device) if settings.expert_norms else None
        router_pass = RouterPass(model, listener, statistics, kept, activity, writer)
        standing = Standing(out, router_pass.sums(), _identity(work, settings, shard))
        done = standing.restore()
        if writer:
            stack.enter_context(writer)
        progress = stack.enter_context(Progress("collect", ours, "tokens"))
        progress.resume_at(sum(batch.tokens for batch in work[first : first + done]))
        started, before = time.monotonic(), progress.done
        for step, batch in enumerate(work[first + done : last], start=done):
            router_pass.route(batch)
            progress.advance(batch.tokens)
            report(step, {"tokens_per_second": (progress.done - before) / max(time.monotonic() - started, 1e-9)})
            standing.save_now_and_then(step + 1)
        tokens_per_second = (progress.done - before) / max(time.monotonic() - started, 1e-9)

    statistics = statistics.to("cpu")
    tokens_per_set = _tokens_per_set(samples, work[first:last])
    _write(out, checkpoint, statistics, kept, activity, tokens_per_set, shard)
    report_file = {
        "strategy": settings.sampling.strategy,
        "wanted_tokens": settings.tokens,
        "tokens": statistics.tokens,
        "warnings": [sample.shortfall for sample in samples if sample.shortfall],
        "sets": {sample.name: sample.report for sample in samples},
    }
    write_json(out / REPORT_NAME, report_file)
    entropy_L = statistics.mean_entropy()
    return {
        "tokens": statistics.tokens,
        "sequences": sum(len(batch.input_ids) for batch in work[first:last]),
        "tokens_per_second": tokens_per_second,
        "router_entropy_nats": float(entropy_L.mean()),
        "router_entropy_share_of_even": float(entropy_L.mean()) / math.log(max(moe.experts, 2)),
        "experts_never_chosen": int((statistics.topk_count == 0).sum()),
        "vocabulary_coverage": _weighted(samples, "vocabulary_coverage"),
        "kl_to_pool_nats": _weighted(samples, "kl_to_pool_nats"),
    }


def _tokens_per_set(samples: Sequence[Sample], work: Sequence[RoutedBatch]) -> dict[str, int]:
    sets_T = torch.cat([batch.sets_T for batch in work])
    counts = torch.bincount(sets_T[sets_T >= 0], minlength=len(samples)).tolist()
    return {sample.name: count for sample, count in zip(samples, counts, strict=True)}


def _identity(work: Sequence[RoutedBatch], settings: Collect, shard: Shard) -> str:
    """What the sums depend on beside the model: the very tokens, how they are batched, what is gathered."""
    digest = hashlib.sha256(f"{STAGE.version} {shard} {settings.model_dump_json()}".encode())
    for batch in work:
        for tensor in (batch.input_ids, batch.positions, batch.sets_T):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _activity(checkpoint: Checkpoint, model: Any, samples: Sequence[Sample], device: str) -> ExpertActivity:
    moe = checkpoint.description
    sets = [sample.name for sample in samples]
    saliency = NeuronSaliency.zeros(moe.layers, sets, moe.experts, moe.expert_width, device)
    return ExpertActivity(saliency, checkpoint.family, checkpoint.config, model)


def _probability_writer(count: int, checkpoint: Checkpoint, out: Path) -> ProbabilityWriter | None:
    """The file for the probabilities of `count` tokens, its size told first; None for none of them.

    Raises UsageError if the disk has no room for it.
    """
    if not count:
        return None
    moe = checkpoint.description
    size = probabilities.stored_bytes(count, len(moe.layers), moe.experts)
    if world().is_first:
        sys.stderr.write(f"{probabilities.FILE_NAME}: {count:,} tokens will take {size / 1e6:,.1f} MB\n")
    free = shutil.disk_usage(out).free
    there = out / probabilities.FILE_NAME
    if size > free + (there.stat().st_size if there.is_file() else 0):
        raise UsageError(
            f"collect.keep_probabilities needs {size / 1e9:,.1f} GB for {count:,} tokens and {out} has "
            f"{free / 1e9:,.1f} GB left; give a smaller number of tokens to keep"
        )
    return ProbabilityWriter(out / probabilities.FILE_NAME, count, moe.layers, moe.experts)


def _write(
    out: Path,
    checkpoint: Checkpoint,
    statistics: RouterStatistics,
    kept: KeptInputs,
    activity: ExpertActivity | None,
    tokens_per_set: Mapping[str, int],
    shard: Shard,
) -> None:
    moe = checkpoint.description
    metadata = {
        "model": checkpoint.name,
        "family": moe.family,
        "layers": list(moe.layers),
        "experts": moe.experts,
        "experts_per_token": moe.experts_per_token,
        "tokens": statistics.tokens,
        "tokens_per_set": dict(tokens_per_set),
        "nexus": __version__,
        **({"shard": str(shard)} if shard.count > 1 else {}),
    }
    statistics.save(out / moments.FILE_NAME, metadata)
    if activity:
        activity.saliency.save(out / SALIENCY_NAME, metadata)
    tensors = kept.tensors()
    if tensors:
        write_shard(out / kept_inputs.FILE_NAME, tensors)


def _weighted(samples: Sequence[Sample], figure: str) -> float:
    """A figure of the choice, averaged over the sets by their tokens."""
    total = sum(sample.sequences.tokens for sample in samples)
    return sum(sample.report["sampling"]["chosen"][figure] * sample.sequences.tokens for sample in samples) / total


def _settings(recipe: Recipe) -> dict[str, Any]:
    section = recipe.collect
    names = recipe.data if section.data is None else section.data
    sets = {name: [source.model_dump(mode="json") for source in recipe.data[name]] for name in names}
    return {"collect": wanted_statistics(recipe).model_dump(mode="json"), "data": sets}


def wanted_statistics(recipe: Recipe) -> Collect:
    """The collect section with what the recipe's strategies need switched on."""
    chosen = (
        ("selection", recipe.select.strategy, recipe.select.parameters),
        ("merge", recipe.convert.merge, recipe.convert.parameters),
    )
    needs = frozenset().union(*(choose_strategy(*choice)[0].needs for choice in chosen))
    expert_norms = recipe.collect.expert_norms or bool(needs & NEED_EXPERT_NORMS)
    return recipe.collect.model_copy(update={"expert_norms": expert_norms})


def _run(context: StageContext) -> Metrics:
    return collect(
        context.checkpoint,
        context.data,
        wanted_statistics(context.recipe),
        context.out,
        device=context.device,
        dtype=compute_dtype(context.recipe.model.dtype, context.device),
        report=context.report,
    )


STAGE = Stage(
    name="collect",
    version=3,
    inputs=(GENERATE,),
    settings=_settings,
    run=_run,
    sets=lambda recipe: recipe.collect.data or recipe.data,
    resumes=True,
    splits=True,
    runs_model=True,
)
