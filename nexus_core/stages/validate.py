"""What training gained and what it forgot, on held-out text: the student beside its own base, and a verdict.

# S tokens of a sequence, T of a batch of them
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
from nexus_core.processes import sum_in_place, world
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Recipe, Source, Validate
from nexus_core.report.retention import retention_picture
from nexus_core.stages.stage import GENERATE, Metrics, Stage, StageContext
from nexus_core.stages.train import MODEL_NAME
from nexus_core.statistics.listening import Listener, listen
from nexus_core.train.passes import final_hidden, output_head

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
    side of the sources' split to read. An untouched base is measured against itself. Several processes share the
    sequences, and the first one writes. Raises DataError if a set has no text in that part.
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
    total = sum(len(rows) for packed in sequences.values() for rows in _own_rows(len(packed), settings.batch_size))
    with listen(model, checkpoint.family) as listener, Progress("validate", total, "sequences") as progress:
        for name, packed in sequences.items():
            changes[name] = measure_change(model, listener, packed, settings.batch_size, router, progress)
    layers = checkpoint.description.layers
    router.add_up(sum_in_place, len(layers))
    verdict = judge(changes, learnt, settings.max_perplexity_increase)
    if not world().is_first:
        return _metrics(changes, router, verdict)

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

    A model without additions is run once: it is its own base. Of several processes each runs some of the batches; the
    change is over all of them, `router` gets this process's alone.
    """
    base, student = Perplexity(), Perplexity()
    has_additions = bool(additions(model))
    device = next(model.parameters()).device
    isolates, head = isolates_documents(model), output_head(model)
    positions_S = torch.arange(packed.input_ids.shape[1])
    for numbers in _own_rows(len(packed), batch_size):
        rows = slice(numbers.start, numbers.stop)
        targets_T = packed.targets[rows].flatten().to(device)
        given = {"input_ids": packed.input_ids[rows], **position_arguments(isolates, packed.positions[rows])}
        inputs = {name: tensor.to(device) for name, tensor in given.items()}
        is_text = (positions_S < packed.lengths[rows, None]).flatten().to(device)
        with as_teacher(model):
            base_part = perplexity(final_hidden(model, inputs), targets_T, head)
        base_routers = _router_logits(listener, is_text)
        if has_additions:
            student_part = perplexity(final_hidden(model, inputs), targets_T, head)
            router.update(_router_logits(listener, is_text), base_routers)
        else:
            student_part = base_part
            router.update(base_routers, base_routers)
        base, student = base + base_part, student + student_part
        progress.advance(len(numbers))
    return Change(_of_all(base), _of_all(student))


def _own_rows(rows: int, batch_size: int) -> list[range]:
    """This process's batches: whole ones of all of them, so that their numbers do not depend on the processes."""
    here = world()
    starts = range(here.rank * batch_size, rows, here.size * batch_size)
    return [range(start, min(start + batch_size, rows)) for start in starts]


def _of_all(measured: Perplexity) -> Perplexity:
    """The sum over all processes."""
    nll_nats, tokens = sum_in_place(torch.tensor([measured.nll_nats, measured.tokens], dtype=torch.float64)).tolist()
    return Perplexity(nll_nats, int(tokens))


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
        context.data,
        recipe.validate_,
        recipe.learnt_sets,
        context.out,
        dtype=recipe.model.dtype,
        device=context.device,
    )


STAGE = Stage(
    name="validate",
    version=2,
    inputs=(GENERATE, "train"),
    settings=_settings,
    run=_run,
    splits=True,
    runs_model=True,
)
