"""What training gained and what it forgot, on held-out text: the student beside its own base, and a verdict.

# B sequences, S tokens each
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_core.additions import additions, as_teacher
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.checkpoint.writer import write_json
from nexus_core.data.documents import Part, documents
from nexus_core.data.isolation import isolates_documents, position_arguments
from nexus_core.data.packing import PackedSequences, pack
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.measure.perplexity import Perplexity, perplexity
from nexus_core.measure.router_health import RouterHealth
from nexus_core.measure.verdict import Change, Verdict, judge
from nexus_core.models import compute_dtype, load
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Recipe, Source, Validate
from nexus_core.report.retention import retention_picture
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.train import MODEL_NAME
from nexus_core.statistics.listening import Listener, listen

REPORT_NAME = "report.json"
PICTURE_NAME = "retention.png"


def validate(
    checkpoint: Checkpoint,
    sets: Mapping[str, Sequence[Source]],
    settings: Validate,
    learnt: Collection[str],
    out: Path,
    *,
    part: Part = "held_out",
    dtype: str = "auto",
    device: str = "cpu",
) -> Metrics:
    """Measure a converted or trained checkpoint against its base and write report.json and retention.png into `out`.

    sets: sources by data set name. learnt: sets that should have gained; all others should be retained. part: which
    side of the sources' split to read. An untouched base is measured against itself. Raises DataError if a set has no
    text in that part.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    end_token = end_token_id(tokenizer)
    sequences = {}
    for name, sources in sets.items():
        wanted_tokens = settings.samples * settings.sequence_length
        found = documents(sources, part, tokenizer, limit_tokens=wanted_tokens)
        sequences[name] = pack(found, settings.sequence_length, end_token=end_token, limit_tokens=wanted_tokens)

    model = load(checkpoint, dtype=compute_dtype(dtype, device), device=device)
    router = RouterHealth()
    changes = {}
    total = sum(len(packed) for packed in sequences.values())
    with listen(model, checkpoint.family) as listener, Progress("validate", total, "sequences") as progress:
        for name, packed in sequences.items():
            changes[name] = measure_change(model, listener, packed, settings.batch_size, router, progress)
    verdict = judge(changes, learnt, settings.max_perplexity_increase)

    layers = checkpoint.description.layers
    write_json(out / REPORT_NAME, _report(changes, sequences, learnt, router, layers, verdict))
    pairs = {name: (change.base.perplexity, change.student.perplexity) for name, change in changes.items()}
    if all(math.isfinite(value) for pair in pairs.values() for value in pair):
        retention_picture(pairs, learnt, settings.max_perplexity_increase).savefig(out / PICTURE_NAME)
    return _metrics(changes, router, verdict)


@torch.no_grad()
def measure_change(
    model: nn.Module,
    listener: Listener,
    packed: PackedSequences,
    batch_size: int,
    router: RouterHealth,
    progress: Progress,
) -> Change:
    """Perplexity of the base and of the student on the same sequences; their routers' choices are added to `router`.

    A model without additions is run once: it is its own base.
    """
    base, student = Perplexity(), Perplexity()
    has_additions = bool(additions(model))
    device = next(model.parameters()).device
    isolates = isolates_documents(model)
    positions_S = torch.arange(packed.input_ids.shape[1])
    for start in range(0, len(packed), batch_size):
        rows = slice(start, start + batch_size)
        input_ids_BS, targets_BS = packed.input_ids[rows].to(device), packed.targets[rows].to(device)
        documents_apart = position_arguments(isolates, packed.positions[rows].to(device))
        is_text = (positions_S < packed.lengths[rows, None]).flatten().to(device)
        with as_teacher(model):
            logits_BSV = model(input_ids=input_ids_BS, use_cache=False, **documents_apart).logits
            base_part = perplexity(logits_BSV, targets_BS)
        base_routers = _router_logits(listener, is_text)
        if has_additions:
            logits_BSV = model(input_ids=input_ids_BS, use_cache=False, **documents_apart).logits
            student_part = perplexity(logits_BSV, targets_BS)
            router.update(_router_logits(listener, is_text), base_routers)
        else:
            student_part = base_part
            router.update(base_routers, base_routers)
        base, student = base + base_part, student + student_part
        progress.advance(len(input_ids_BS))
    return Change(base, student)


def _router_logits(listener: Listener, is_text: torch.Tensor) -> list[torch.Tensor]:
    return [listener.routers[layer].logits.flatten(0, -2)[is_text] for layer in listener.layers]


def _report(
    changes: Mapping[str, Change],
    sequences: Mapping[str, PackedSequences],
    learnt: Collection[str],
    router: RouterHealth,
    layers: Sequence[int],
    verdict: Verdict,
) -> dict[str, Any]:
    """report.json; a number that is not finite is null."""
    columns = zip(layers, router.entropy.tolist(), router.base_entropy.tolist(), router.l1.tolist(), strict=True)
    return _finite(
        {
            "sets": {
                name: {
                    "base": _perplexity(change.base),
                    "student": _perplexity(change.student),
                    "change": change.relative,
                    "tokens": change.student.tokens,
                    "sequences": len(sequences[name]),
                    "purpose": "learn" if name in learnt else "keep",
                }
                for name, change in changes.items()
            },
            "router": {
                "entropy": float(router.entropy.mean()),
                "entropy_base": float(router.base_entropy.mean()),
                "l1": float(router.l1.mean()),
                "layers": [
                    {"layer": layer, "entropy": entropy, "entropy_base": entropy_base, "l1": l1}
                    for layer, entropy, entropy_base, l1 in columns
                ],
            },
            "verdict": verdict.as_json(),
        }
    )


def _perplexity(measured: Perplexity) -> dict[str, float]:
    return {"perplexity": measured.perplexity, "nll_nats_per_token": measured.nll_nats_per_token}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _metrics(changes: Mapping[str, Change], router: RouterHealth, verdict: Verdict) -> Metrics:
    metrics: Metrics = {}
    for name, change in changes.items():
        metrics[f"perplexity/{name}/base"] = change.base.perplexity
        metrics[f"perplexity/{name}/student"] = change.student.perplexity
        metrics[f"change/{name}"] = change.relative
    metrics["router/l1"] = float(router.l1.mean())
    metrics["router/entropy"] = float(router.entropy.mean())
    metrics["router/entropy_base"] = float(router.base_entropy.mean())
    metrics["verdict"] = verdict.short
    return metrics


def _settings(recipe: Recipe) -> dict[str, object]:
    section = recipe.validate_.model_dump(mode="json")
    sources = {name: [source.model_dump(mode="json") for source in sources] for name, sources in recipe.data.items()}
    return section | {"sources": sources, "learn": list(recipe.learnt_sets), "dtype": recipe.model.dtype}


def _run(context: StageContext) -> Metrics:
    recipe = context.recipe
    return validate(
        open_checkpoint(context.inputs["train"] / MODEL_NAME),
        recipe.data,
        recipe.validate_,
        recipe.learnt_sets,
        context.out,
        dtype=recipe.model.dtype,
        device=context.device,
    )


STAGE = Stage(name="validate", version=2, inputs=("train",), settings=_settings, run=_run)
