"""A model and data to router statistics: which experts the data goes to, exactly, in a few megabytes."""

# B sequences, S sequence length, T tokens of a batch (B * S)

from __future__ import annotations

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
from nexus_core.errors import StageError, UsageError
from nexus_core.models import compute_dtype, load
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Collect, Recipe, Source
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.statistics import moments, probabilities
from nexus_core.statistics.kept_inputs import KeptInputs
from nexus_core.statistics.listening import Listener, listen
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.probabilities import ProbabilityWriter

MOE_INPUTS_NAME = "moe_inputs.safetensors"
REPORT_NAME = "sampling_report.json"

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
) -> Metrics:
    """Route `settings.tokens` tokens of the data through the base model and write what its routers did into `out`.

    Of a converted or trained model it is the base in it that is asked. sets: the sources of each data set by name;
    `settings.data` tells their shares. part: which side of each source's split is used. Raises DataError if data is
    missing or unusable, StageError if a router gives numbers that are not finite or memory runs out.
    """
    shares = choose_shares(settings.data, sets)
    samples = draw(checkpoint, sets, shares, settings, part)
    tokens = sum(sample.sequences.tokens for sample in samples)
    shortfalls = [sample.shortfall for sample in samples if sample.shortfall]
    for warning in shortfalls:
        log.warning("%s", warning)

    moe = checkpoint.description
    statistics = RouterStatistics.zeros(moe.layers, moe.experts, device)
    kept = KeptInputs(moe.layers, tokens, settings.keep_inputs)
    started = time.monotonic()
    with ExitStack() as stack:
        writer = _probability_writer(settings.keep_probabilities, tokens, checkpoint, out)
        if writer:
            stack.enter_context(writer)
        model = stack.enter_context(as_teacher(load(checkpoint, dtype=dtype, device=device)))
        listener = stack.enter_context(listen(model, checkpoint.family, keep_inputs=settings.keep_inputs > 0))
        progress = stack.enter_context(Progress("collect", tokens, "tokens"))
        stack.enter_context(torch.inference_mode())
        started = time.monotonic()
        for step, (input_ids_BS, mask_T) in enumerate(_batches(samples, settings.batch_size)):
            _forward(model, input_ids_BS.to(device))
            _record(statistics, kept, writer, listener, mask_T)
            _refuse_non_finite(statistics)
            progress.advance(int(mask_T.sum()))
            report(step, {"tokens_per_second": progress.done / max(time.monotonic() - started, 1e-9)})
    seconds = time.monotonic() - started

    statistics = statistics.to("cpu")
    _write(out, checkpoint, statistics, kept, samples)
    report_file = {
        "strategy": settings.sampling.strategy,
        "wanted_tokens": settings.tokens,
        "tokens": statistics.tokens,
        "warnings": shortfalls,
        "sets": {sample.name: sample.report for sample in samples},
    }
    write_json(out / REPORT_NAME, report_file)
    entropy_L = statistics.mean_entropy()
    return {
        "tokens": statistics.tokens,
        "sequences": sum(len(sample.sequences) for sample in samples),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "router_entropy_nats": float(entropy_L.mean()),
        "router_entropy_share_of_even": float(entropy_L.mean()) / math.log(max(moe.experts, 2)),
        "experts_never_chosen": int((statistics.topk_count == 0).sum()),
        "vocabulary_coverage": _weighted(samples, "vocabulary_coverage"),
        "kl_to_pool_nats": _weighted(samples, "kl_to_pool_nats"),
    }


def _batches(samples: Sequence[Sample], batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input ids (B, S), and on CPU which of their tokens (T,) are real, of all sets in turn."""
    input_ids = torch.cat([sample.sequences.input_ids for sample in samples])
    lengths = torch.cat([sample.sequences.lengths for sample in samples])
    positions_S = torch.arange(input_ids.shape[1])
    return [
        (ids_BS, (positions_S < lengths_B[:, None]).flatten())
        for ids_BS, lengths_B in zip(input_ids.split(batch_size), lengths.split(batch_size), strict=True)
    ]


def _forward(model: Any, input_ids_BS: torch.Tensor) -> None:
    """One pass through the layers. The output head is left out: its logits are the widest thing, and nobody reads them.

    Sequences are padded on the right, where causal attention lets nothing see the padding.
    """
    try:
        model.base_model(input_ids=input_ids_BS, use_cache=False)
    except torch.cuda.OutOfMemoryError as error:
        batch_size, sequence_length = input_ids_BS.shape
        raise StageError(
            f"the GPU has no memory left for {batch_size} sequences of {sequence_length} tokens; lower "
            "collect.batch_size or collect.sequence_length"
        ) from error


def _record(
    statistics: RouterStatistics,
    kept: KeptInputs,
    writer: ProbabilityWriter | None,
    listener: Listener,
    mask_T: torch.Tensor,
) -> None:
    listener.refuse_if_incomplete()
    # Only the last sequences of a set are padded; picking tokens would copy all the others for nothing.
    mask = None if bool(mask_T.all()) else mask_T.to(statistics.probability_sum.device)
    for position, layer in enumerate(statistics.layers):
        statistics.update(position, listener.routers[layer], mask)
    if listener.inputs:
        kept.update(listener.inputs, listener.outputs, mask_T)
    if writer:
        logits = [listener.routers[layer].logits for layer in statistics.layers]
        writer.write(logits if mask is None else [logits_TE[mask] for logits_TE in logits])
    listener.clear()


def _refuse_non_finite(statistics: RouterStatistics) -> None:
    is_finite_L = statistics.probability_sum.isfinite().all(dim=1)
    if not bool(is_finite_L.all()):
        layer = statistics.layers[int(is_finite_L.int().argmin())]
        raise StageError(
            f"the router of layer {layer} gave numbers that are not finite; the checkpoint may be damaged, or overflow "
            "in this type: try float32 (model.dtype, --dtype)"
        )


def _probability_writer(keep: bool | int, tokens: int, checkpoint: Checkpoint, out: Path) -> ProbabilityWriter | None:
    """The file for probabilities, its size told first. Raises UsageError if the disk has no room for it."""
    if not keep:
        return None
    moe = checkpoint.description
    count = tokens if keep is True else min(int(keep), tokens)
    size = probabilities.stored_bytes(count, len(moe.layers), moe.experts)
    sys.stderr.write(f"{probabilities.FILE_NAME}: {count:,} tokens will take {size / 1e6:,.1f} MB\n")
    free = shutil.disk_usage(out).free
    if size > free:
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
    samples: Sequence[Sample],
) -> None:
    moe = checkpoint.description
    metadata = {
        "model": checkpoint.name,
        "family": moe.family,
        "layers": list(moe.layers),
        "experts": moe.experts,
        "experts_per_token": moe.experts_per_token,
        "tokens": statistics.tokens,
        "tokens_per_set": {sample.name: sample.sequences.tokens for sample in samples},
        "nexus": __version__,
    }
    statistics.save(out / moments.FILE_NAME, metadata)
    tensors = kept.tensors()
    if tensors:
        write_shard(out / MOE_INPUTS_NAME, tensors)


def _weighted(samples: Sequence[Sample], figure: str) -> float:
    """A figure of the choice, averaged over the sets by their tokens."""
    total = sum(sample.sequences.tokens for sample in samples)
    return sum(sample.report["sampling"]["chosen"][figure] * sample.sequences.tokens for sample in samples) / total


def _settings(recipe: Recipe) -> dict[str, Any]:
    section = recipe.collect
    names = recipe.data if section.data is None else section.data
    sets = {name: [source.model_dump(mode="json") for source in recipe.data[name]] for name in names}
    return {"collect": section.model_dump(mode="json"), "data": sets}


def _run(context: StageContext) -> Metrics:
    return collect(
        context.checkpoint,
        context.recipe.data,
        context.recipe.collect,
        context.out,
        device=context.device,
        dtype=compute_dtype(context.recipe.model.dtype, context.device),
        report=context.report,
    )


STAGE = Stage(name="collect", version=1, inputs=(), settings=_settings, run=_run)
