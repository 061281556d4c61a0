"""`nexus capture`: store a teacher's outputs over the text that `nexus train` will draw."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nexus_core.cli.folders import resumable_folder
from nexus_core.cli.launch import in_processes
from nexus_core.cli.options import device_option, dtype_option, held_out_option, json_option, out_option, section_option
from nexus_core.cli.output import failure_as_json, print_done
from nexus_core.cli.sources import contents, learnt_and_kept


@click.command("capture")
@click.argument("model")
@click.option("--learn", metavar="NAME=FILE", multiple=True, required=True, help="As for nexus train.")
@click.option("--keep", metavar="NAME=FILE", multiple=True, help="As for nexus train.")
@click.option("--steps", type=int, help="Optimizer steps of the training.  [default: 10000]")
@click.option("--teacher-model", metavar="MODEL", help="Another model of the same vocabulary to learn from.")
@held_out_option
@section_option("train section, as for nexus train, e.g. sequence_length=512 or teacher.top_logits=64")
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
    teacher_model: str | None,
    held_out: float,
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Store what the base of MODEL, or another teacher, says about a training's text, so that none is run then.

    Give the same files, steps and settings of the text (batch size, accumulation, sequence length, seed) as to `nexus
    train MODEL --teacher DIR`, which refuses a teacher of other text; losses, schedule and routing may differ.
    Interrupted or killed, the same command goes on where it stopped.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.fingerprint import fingerprint
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.models import choose_device
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.training import Train
        from nexus_core.stages.capture import STAGE, capture, teacher_checkpoint

        learnt, kept = learnt_and_kept(learn, keep, held_out)
        sets = learnt | kept
        values = {
            "data": dict.fromkeys(sets, 1.0),
            "learn": list(learnt),
            "max_steps": steps,
            "teacher": {"kind": "offline"} | ({"path": teacher_model} if teacher_model else {}),
        }
        settings = section_from(Train, values, assignments, {"max_steps": "--steps"})
        checkpoint = open_checkpoint(model)
        place = choose_device(device)
        identity = {
            "version": STAGE.version,
            "model": fingerprint(teacher_checkpoint(checkpoint, settings).folder),
            "settings": settings.model_dump(mode="json"),
            "data": contents(sets),
            "held_out": held_out,
            "dtype": dtype,
        }
        with resumable_folder(out, identity) as folder:
            metrics = capture(checkpoint, sets, settings, list(learnt), folder, dtype=dtype, device=place)
    print_done(as_json, {"path": out, "metrics": metrics}, lambda: _as_text(model, out, metrics))


def _as_text(model: str, out: Path, metrics: Mapping[str, Any]) -> list[str]:
    lines = [f"stored      {metrics['sequences']:,} sequences, {metrics['bytes'] / 1e6:,.1f} MB"]
    if "kept_tokens" in metrics:
        lines.append(
            f"vocabulary  {metrics['kept_tokens']:,} kept tokens, {metrics['vocabulary_bytes_per_token']:.1f} bytes "
            f"each: {metrics['ids_per_token']:.1f} likeliest, {metrics['tail_mass']:.1%} left over; KL to the teacher "
            f"{metrics['vocabulary_kl_nats']:.1e} nats"
        )
    if "text_tokens" in metrics:
        lines.append(
            f"routers     {metrics['text_tokens']:,} tokens, {metrics['router_bytes_per_token']:,.0f} bytes each; KL "
            f"to the teacher's {metrics['stored_router_kl_nats']:.1e} nats"
        )
    command = f"nexus train {shlex.quote(model)} --teacher {shlex.quote(str(out))} ... --out DIR"
    return [*lines, "", f"next        {command}"]
