"""`nexus train`: distil a converted model's shared experts on your own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.folders import resumable_folder
from nexus_core.cli.launch import in_processes
from nexus_core.cli.options import device_option, dtype_option, held_out_option, json_option, out_option, section_option
from nexus_core.cli.output import failure_as_json, print_done
from nexus_core.cli.sources import contents, learnt_and_kept
from nexus_core.processes import world

if TYPE_CHECKING:
    from nexus_core.recipe.training import Train


@click.command("train")
@click.argument("model")
@click.option("--learn", metavar="NAME=FILE", multiple=True, required=True, help="Data to learn; may be given again.")
@click.option(
    "--keep", metavar="NAME=FILE", multiple=True, help="Data to keep as the base does it; may be given again."
)
@click.option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@click.option("--learning-rate", type=float, help="Full learning rate of AdamW.  [default: 1e-5]")
@click.option("--routing", help="What of the router learns: frozen (the default), trainable, bias, balance, sparsify.")
@click.option(
    "--teacher",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="What `nexus capture` stored of the same text: no teacher pass is run.",
)
@held_out_option
@section_option("train section, e.g. sequence_length=512, losses.logits_kl=8.0 or data.NAME=0.75")
@click.option(
    "--zero-stage",
    type=click.IntRange(0, 3),
    metavar="0|1|2|3",
    help="Of several processes, have DeepSpeed keep only parts in each: of the optimizer from 1, of gradients from 2, "
    "of the base at 3.",
)
@dtype_option
@device_option
@out_option
@json_option
@in_processes
def command(
    model: str,
    learn: tuple[str, ...],
    keep: tuple[str, ...],
    steps: int | None,
    learning_rate: float | None,
    routing: str | None,
    teacher: Path | None,
    held_out: float,
    assignments: tuple[str, ...],
    zero_stage: int | None,
    dtype: str,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Train the shared experts of MODEL, which `nexus convert` wrote.

    Learns the text of --learn and keeps the base's predictions on the text of --keep. Whole files are used: hold back
    other files for `nexus validate`, or a share with --held-out. Several files of one NAME are one data set; sets have
    equal shares. Interrupted or killed, the same command goes on where it stopped. DIR/model is the trained model.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.fingerprint import fingerprint
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.models import choose_device
        from nexus_core.pipeline.keys import data_identity
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import DeepSpeed
        from nexus_core.recipe.training import Train
        from nexus_core.stages.train import MODEL_NAME, STAGE, train
        from nexus_core.train.start import start_shard
        from nexus_core.train.teacher_store import TeacherStore

        learnt, kept = learnt_and_kept(learn, keep, held_out)
        sets = learnt | kept
        values = {
            "data": dict.fromkeys(sets, 1.0),
            "learn": list(learnt),
            "max_steps": steps,
            "learning_rate": learning_rate,
            "routing": {"strategy": routing} if routing else None,
            "teacher": {"kind": "offline"} if teacher else None,
        }
        settings = section_from(Train, values, assignments, {"max_steps": "--steps"})
        refuse_idle_processes(settings, world().size)
        checkpoint = open_checkpoint(model)
        place = choose_device(device)
        identity = {
            "version": STAGE.version,
            "model": fingerprint(checkpoint.folder),
            "settings": settings.model_dump(mode="json"),
            "data": contents(sets),
            "held_out": held_out,
            "dtype": dtype,
        }
        if teacher:
            identity["teacher"] = TeacherStore(teacher).digest
        if settings.start_from:
            identity["start_from"] = data_identity(str(start_shard(settings.start_from)))
        with resumable_folder(out, identity) as folder:
            metrics = train(
                *(checkpoint, sets, settings, list(learnt), folder),
                teacher=teacher,
                dtype=dtype,
                device=place,
                deepspeed=None if zero_stage is None else DeepSpeed.model_validate({"zero_stage": zero_stage}),
            )
    answer = {"path": out, "model": out / MODEL_NAME, "metrics": metrics}
    print_done(as_json, answer, lambda: _as_text(out, metrics, keep))


def refuse_idle_processes(settings: Train, processes: int) -> None:
    """Raises UsageError if a step has fewer sequences than there are processes to share them, as a recipe's check."""
    from nexus_core.errors import UsageError

    sequences = settings.batch_size * settings.gradient_accumulation
    if processes > sequences:
        raise UsageError(
            f"--processes {processes}: a step has {sequences} sequences to share (batch_size {settings.batch_size} x "
            f"gradient_accumulation {settings.gradient_accumulation}); start at most as many, or raise one with --set"
        )


def _as_text(out: Path, metrics: Mapping[str, Any], keep: tuple[str, ...]) -> list[str]:
    lines = [
        f"trained     {metrics['trainable_parameters']:,} parameters in {metrics['steps']:,} steps, "
        f"{metrics['tokens']:,} tokens",
        f"loss        {metrics['loss_before']:.4g} at the start, {metrics['loss']:.4g} over the last tenth",
    ]
    names = ("lm", "router_kl", "logits_kl", "hidden_match")
    parts = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
    if parts:
        lines.append(f"its parts   {', '.join(parts)}")
    if "router_l1" in metrics:
        lines.append(f"router      L1 distance to the base {metrics['router_l1']:.3g}")
    flags = " ".join(f"--data {name.partition('=')[0]}=FILE" for name in keep) or "--data NAME=FILE"
    return [*lines, "", f"model       {out / 'model'}", f"next        nexus validate {out / 'model'} {flags} --out DIR"]
