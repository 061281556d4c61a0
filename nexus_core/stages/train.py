"""Distillation of a converted checkpoint's shared experts: the domain is learnt, the rest stays as the base has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.data.mixture import TrainingBatches
from nexus_core.data.packing import PackedSequences
from nexus_core.distill.signals import TEACHER_ROUTER_LOGITS
from nexus_core.errors import CheckpointError, UsageError
from nexus_core.models import compute_dtype, load
from nexus_core.processes import world
from nexus_core.recipe.schema import DeepSpeed, Recipe, Source
from nexus_core.recipe.training import Train
from nexus_core.report.curves import training_curves
from nexus_core.report.schedule import schedule_picture
from nexus_core.routing import ROUTER_DELTA
from nexus_core.stages.capture import identity_of, teacher_checkpoint, vocabulary_digest
from nexus_core.stages.stage import GENERATE, Metrics, Stage, StageContext
from nexus_core.stages.strategies import choose_strategy
from nexus_core.stages.training_text import held_out_sequences, shares_of, training_sequences
from nexus_core.train.engines import is_cut
from nexus_core.train.evaluation import HELD_OUT, HeldOut
from nexus_core.train.journal import Journal, Row, mean_of_last
from nexus_core.train.loop import JOURNAL_NAME, Trained, fit
from nexus_core.train.schedule import Schedule
from nexus_core.train.setup import Loss, Objective
from nexus_core.train.start import start_from, start_shard
from nexus_core.train.stored_teacher import OfflineTeacher
from nexus_core.train.teacher_store import TeacherStore
from nexus_core.train.trained_model import changed_keys, write_trained_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_NAME = "model"
CURVES_NAME = "curves.png"
SCHEDULE_NAME = "schedule.png"

# The curves are drawn while a run goes on, but no more often than this.
SECONDS_BETWEEN_PICTURES = 60.0

# How training is watched and saved; the numbers that come out do not depend on it.
NOT_IN_THE_KEY = frozenset({"checkpoint_every", "keep_checkpoints"})


def train(
    checkpoint: Checkpoint,
    sets: Mapping[str, Sequence[Source]],
    settings: Train,
    learnt: Sequence[str],
    out: Path,
    *,
    teacher: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    deepspeed: DeepSpeed | None = None,
    report: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> Metrics:
    """Train a converted checkpoint and write model/, metrics.jsonl, checkpoints/ and pictures into `out`.

    sets: the sources of every data set to train on, by name; their shares are those of `settings.data`, equal if it
    is None. learnt: names of the sets to learn from; the others are kept. out: empty, or left by an interrupted call
    with the same arguments, which then goes on from its newest checkpoint. teacher: the folder that capture filled, if
    `settings.teacher` is offline. dtype: as `model.dtype` of a recipe. deepspeed: how several processes share what
    there is; all of them call this, the first one writes, and the others' answer is empty. Raises CheckpointError if
    the checkpoint has no shared expert, DataError if a set has no text to train on, UsageError if the stored teacher is
    another run's, TrainingError if training diverges.
    """
    if not checkpoint.description.shared_expert_width:
        raise CheckpointError(
            f"{checkpoint.name}: is an untouched base without shared experts, so there is nothing to train; "
            "give it some with nexus convert"
        )
    objective = training_objective(settings)
    sequences = training_sequences(checkpoint.folder, sets, settings)
    batches = TrainingBatches(sequences, shares_of(sets, settings), settings.batch_size, settings.seed)
    source = None
    if settings.teacher.kind == "offline":
        source = OfflineTeacher(
            _stored_teacher(teacher, checkpoint, sequences, settings, objective, learnt), learnt, device
        )
    held_out = None
    if settings.evaluate.every is not None:
        held_out = HeldOut(
            held_out_sequences(checkpoint.folder, sets, settings),
            settings.batch_size,
            learnt,
            settings.loss_weights.get("logits_kl") or 1.0,
        )
    here = world()
    # A model that is cut into parts comes in through the machine's memory: it need not fit on one GPU.
    loads_on = "cpu" if deepspeed and deepspeed.zero_stage == 3 and is_cut(deepspeed, here) else device
    model = load(checkpoint, dtype=compute_dtype(dtype, device), device=loads_on)
    config_before = model.config.to_dict()
    if settings.start_from is not None:
        start_from(model, checkpoint.family, start_shard(settings.start_from))
    if here.is_first:
        schedule_figure(settings).savefig(out / SCHEDULE_NAME)
    kept = [name for name in sets if name not in learnt]
    title = f"Training: {', '.join(learnt)} learnt" + (f", {', '.join(kept)} kept" if kept else "")
    pictures = _Pictures(out, title, list(settings.losses))

    def tell(step: int, values: Mapping[str, float]) -> None:
        report(step, values)
        pictures.draw_now_and_then()

    trained = fit(
        model,
        checkpoint.family,
        batches,
        settings,
        objective,
        learnt,
        out,
        tell,
        teacher=source,
        held_out=held_out,
        deepspeed=deepspeed,
        device=device,
    )
    if not here.is_first:
        return {}
    changes = changed_keys(config_before, model.config.to_dict())
    write_trained_model(checkpoint, out / MODEL_NAME, trained.additions, changes)
    pictures.draw()
    return _metrics(trained, settings)


def training_objective(settings: Train) -> Objective:
    """The losses and the routing strategy that the settings name. Raises UsageError for an unknown one."""
    losses = []
    for name, weight in settings.loss_weights.items():
        strategy, parameters = choose_strategy("losses", name, settings.loss_parameters[name])
        if weight > 0:
            losses.append(Loss(strategy, weight, parameters))
    routing, routing_parameters = choose_strategy("routing", settings.routing.strategy, settings.routing.parameters)
    return Objective(tuple(losses), routing, routing_parameters)


def schedule_figure(settings: Train) -> Figure:
    """Learning rate, temperature and the router's end of learning over the steps: before the first of them, because a
    long run is best stopped before it starts.
    """
    schedule = Schedule.of(settings)
    steps = [schedule.at(step) for step in range(1, settings.max_steps + 1)]
    last = schedule.last_bias_step
    learns = ROUTER_DELTA in training_objective(settings).routing.needs and 0 < last < settings.max_steps
    return schedule_picture(
        [step.learning_rate for step in steps],
        [step.temperature for step in steps],
        last if learns else None,
        "router biases stop learning" if settings.schedule.after_freeze == "weights" else "router stops learning",
    )


def _stored_teacher(
    folder: Path | None,
    checkpoint: Checkpoint,
    sequences: Mapping[str, PackedSequences],
    settings: Train,
    objective: Objective,
    learnt: Sequence[str],
) -> TeacherStore:
    """The store in `folder`. Raises UsageError if it is not of this run's teacher, tokenizer and text."""
    if folder is None:
        raise UsageError(
            "train.teacher.kind is offline, but no stored teacher was given; make one with nexus capture, and name it "
            "with --teacher"
        )
    store = TeacherStore(folder)
    model = identity_of(teacher_checkpoint(checkpoint, settings))
    needs_routers = TEACHER_ROUTER_LOGITS in objective.needs
    tokenizer = vocabulary_digest(checkpoint.folder)
    store.refuse_unless_of(sequences, frozenset(learnt), model, tokenizer, needs_routers)
    return store


class _Pictures:
    """curves.png in `folder`, drawn from its journal."""

    def __init__(self, folder: Path, title: str, losses: Sequence[str]):
        self.folder, self.title, self.losses = folder, title, losses
        self.journal = Journal(folder / JOURNAL_NAME)
        self._drawn = time.monotonic()

    def draw(self) -> None:
        picture = training_curves(self.journal.rows(), self.title, self.losses)
        partial = self.folder / f".{CURVES_NAME}"
        picture.savefig(partial, format="png")
        partial.replace(self.folder / CURVES_NAME)
        self._drawn = time.monotonic()

    def draw_now_and_then(self) -> None:
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES:
            self.draw()


def _metrics(trained: Trained, settings: Train) -> Metrics:
    """Final numbers are means over the last tenth of the steps: single steps differ by their data."""
    rows = trained.journal.rows()
    metrics: Metrics = {
        "steps": trained.steps,
        "trainable_parameters": trained.learning_numbers,
    }
    metrics["tokens"] = trained.steps * settings.gradient_accumulation * settings.batch_size * settings.sequence_length
    watched = ("loss", *settings.losses, "router_l1", "router_entropy", "gradient_norm", "tokens_per_second")
    for name in watched:
        value = mean_of_last(rows, name)
        if value is not None:
            metrics[name] = value
    for row in rows[:1]:
        metrics |= {f"{name}_before": row[name] for name in ("loss", "lm", "perplexity") if name in row}
    skipped = sum("skipped" in row for row in rows)
    if skipped:
        metrics["skipped_steps"] = skipped
    chosen = [row for row in rows if row["step"] == trained.chosen_step]
    if settings.evaluate.every is not None:
        metrics["chosen_step"] = trained.chosen_step
        metrics |= _held_out(chosen)
    return metrics


def _held_out(rows: list[Row]) -> Metrics:
    """Held-out nats per token of the chosen state."""
    return {name: value for row in rows for name, value in row.items() if name.startswith(HELD_OUT)}


def _settings(recipe: Recipe) -> dict[str, object]:
    # What of the teacher matters is in the key of what capture stored.
    excluded = {*NOT_IN_THE_KEY, "teacher", "start_from"}
    section = recipe.train.model_dump(mode="json", exclude=excluded)
    settings = section | {
        "teacher": recipe.train.teacher.kind,
        "learn": list(recipe.learnt_sets),
        "sources": {
            name: [source.model_dump(mode="json") for source in recipe.data[name]] for name in recipe.trained_sets
        },
        "dtype": recipe.model.dtype,
    }
    if recipe.train.start_from is not None:
        settings["start_from"] = {"path": str(start_shard(recipe.train.start_from))}
    return settings


def _run(context: StageContext) -> Metrics:
    recipe = context.recipe
    return train(
        open_checkpoint(context.inputs["convert"]),
        {name: context.data[name] for name in recipe.trained_sets},
        recipe.train,
        recipe.learnt_sets,
        context.out,
        teacher=context.inputs.get("capture"),
        dtype=recipe.model.dtype,
        device=context.device,
        deepspeed=recipe.run.deepspeed,
        report=context.report,
    )


STAGE = Stage(
    name="train",
    version=2,
    inputs=(GENERATE, "convert", "capture"),
    settings=_settings,
    run=_run,
    sets=lambda recipe: recipe.trained_sets,
    resumes=True,
    splits=True,
    runs_model=True,
)
