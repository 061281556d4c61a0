"""Distillation of a converted checkpoint's shared experts: the domain is learnt, the rest stays as the base has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.documents import documents
from nexus_core.data.mixture import TrainingBatches
from nexus_core.data.packing import pack
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.errors import CheckpointError
from nexus_core.models import compute_dtype, load
from nexus_core.recipe.schema import Recipe, Source, Train
from nexus_core.report.curves import training_curves
from nexus_core.report.schedule import schedule_picture
from nexus_core.routing import ROUTER_DELTA
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.strategies import choose_strategy
from nexus_core.train.journal import Row, mean_of_last
from nexus_core.train.loop import fit
from nexus_core.train.schedule import Schedule
from nexus_core.train.setup import Loss, Objective
from nexus_core.train.trained_model import changed_keys, write_trained_model

MODEL_NAME = "model"
CURVES_NAME = "curves.png"
SCHEDULE_NAME = "schedule.png"

# How training is watched and saved; the numbers that come out do not depend on it.
NOT_IN_THE_KEY = frozenset({"checkpoint_every", "keep_checkpoints"})


def train(
    checkpoint: Checkpoint,
    sets: Mapping[str, Sequence[Source]],
    settings: Train,
    learnt: Sequence[str],
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    report: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> Metrics:
    """Train a converted checkpoint and write model/, metrics.jsonl, checkpoints/ and pictures into `out`.

    sets: the sources of every data set to train on, by name; their shares are those of `settings.data`, equal if it
    is None. learnt: names of the sets to learn from; the others are kept. dtype: as `model.dtype` of a recipe. out:
    empty, or left by an interrupted call with the same arguments, which then goes on from its newest checkpoint.
    Raises CheckpointError if the checkpoint has no shared expert, DataError if a set has no text to train on,
    TrainingError if training diverges.
    """
    if not checkpoint.description.shared_expert_width:
        raise CheckpointError(
            f"{checkpoint.name}: is an untouched base without shared experts, so there is nothing to train; "
            "give it some with nexus convert"
        )
    objective = training_objective(settings)
    batches = training_batches(checkpoint.folder, sets, settings)
    model = load(checkpoint, dtype=compute_dtype(dtype, device), device=device)
    _draw_schedule(settings, routing_learns=ROUTER_DELTA in objective.routing.needs, path=out / SCHEDULE_NAME)
    config_before = model.config.to_dict()
    trained = fit(model, checkpoint.family, batches, settings, objective, learnt, out, report)
    trainables = checkpoint.family.hook.nexus_trainable_parameters(model=model)
    write_trained_model(checkpoint, out / MODEL_NAME, trainables, changed_keys(config_before, model.config.to_dict()))
    rows = trained.journal.rows()
    kept = [name for name in sets if name not in learnt]
    title = f"Training: {', '.join(learnt)} learnt" + (f", {', '.join(kept)} kept" if kept else "")
    training_curves(rows, title).savefig(out / CURVES_NAME)
    return _metrics(rows, settings, sum(parameter.numel() for parameter in trained.parameters.values()))


def training_objective(settings: Train) -> Objective:
    """The losses and the routing strategy that the settings name. Raises UsageError for an unknown one."""
    losses = []
    for name, weight in settings.losses.items():
        strategy, parameters = choose_strategy("losses", name, {})
        if weight > 0:
            losses.append(Loss(strategy, weight, parameters))
    routing, routing_parameters = choose_strategy("routing", settings.routing.strategy, settings.routing.parameters)
    return Objective(tuple(losses), routing, routing_parameters)


def training_batches(tokenizer_folder: Path, sets: Mapping[str, Sequence[Source]], settings: Train) -> TrainingBatches:
    """The run's micro-batches: no more of each set is read than the run will draw."""
    tokenizer = load_tokenizer(tokenizer_folder)
    end_token = end_token_id(tokenizer)
    shares = {name: settings.data[name] if settings.data else 1.0 for name in sets}
    rows = settings.max_steps * settings.gradient_accumulation * settings.batch_size
    packed = {}
    for name, sources in sets.items():
        own_rows = math.ceil(rows * shares[name] / sum(shares.values())) + 1
        found = documents(
            sources,
            "train",
            tokenizer,
            limit_tokens=own_rows * settings.sequence_length,
            seed=settings.seed,
            repeat=True,
        )
        packed[name] = pack(found, settings.sequence_length, end_token=end_token)
    return TrainingBatches(packed, shares, settings.batch_size, settings.seed)


def _draw_schedule(settings: Train, *, routing_learns: bool, path: Path) -> None:
    """Before the first step, because a long run is best stopped before it starts."""
    schedule = Schedule.of(settings)
    steps = [schedule.at(step) for step in range(1, settings.max_steps + 1)]
    last = sum(step.router_learns for step in steps)
    picture = schedule_picture(
        [step.learning_rate for step in steps],
        [step.temperature for step in steps],
        last if routing_learns and 0 < last < settings.max_steps else None,
    )
    picture.savefig(path)


def _metrics(rows: list[Row], settings: Train, trainable_parameters: int) -> Metrics:
    """Final numbers are means over the last tenth of the steps: single steps differ by their data."""
    metrics: Metrics = {"steps": settings.max_steps, "trainable_parameters": trainable_parameters}
    metrics["tokens"] = (
        settings.max_steps * settings.gradient_accumulation * settings.batch_size * settings.sequence_length
    )
    watched = ("loss", *settings.losses, "router_l1", "router_entropy", "gradient_norm", "tokens_per_second")
    for name in watched:
        value = mean_of_last(rows, name)
        if value is not None:
            metrics[name] = value
    for row in rows[:1]:
        metrics |= {f"{name}_before": row[name] for name in ("loss", "lm") if name in row}
    return metrics


def _settings(recipe: Recipe) -> dict[str, object]:
    section = recipe.train.model_dump(mode="json", exclude=set(NOT_IN_THE_KEY))
    names = recipe.train.data or recipe.data
    return section | {
        "learn": list(recipe.learnt_sets),
        "sources": {name: [source.model_dump(mode="json") for source in recipe.data[name]] for name in names},
        "dtype": recipe.model.dtype,
    }


def _run(context: StageContext) -> Metrics:
    recipe = context.recipe
    return train(
        open_checkpoint(context.inputs["convert"]),
        {name: recipe.data[name] for name in recipe.train.data or recipe.data},
        recipe.train,
        recipe.learnt_sets,
        context.out,
        dtype=recipe.model.dtype,
        device=context.device,
        report=context.report,
    )


STAGE = Stage(name="train", version=1, inputs=("convert",), settings=_settings, run=_run, resumes=True)
