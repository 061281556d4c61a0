"""`nexus check`: everything that can be known about a recipe before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.estimates import (
    device_line,
    memory_table,
    place_lines,
    stage_table,
    stages_as_json,
    warnings,
    weight_lines,
    weights_as_json,
)
from nexus_core.cli.options import json_option, set_option
from nexus_core.cli.output import failure_as_json, print_json

if TYPE_CHECKING:
    from nexus_core.pipeline.outline import Outline
    from nexus_core.pipeline.preflight import Preflight
    from nexus_core.recipe.schema import Recipe

# Stages whose memory is shown by part: those that hold the model.
HOLD_MODEL = ("generate", "collect", "capture", "train", "validate")


@click.command("check")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the training schedule into FILE (png, pdf, svg).",
)
@click.option(
    "--device",
    "named",
    metavar="NAME",
    help="Estimate for a device of the table, e.g. h200, instead of this machine's.",
)
@click.option("--schema-only", is_flag=True, help="Look at the recipe alone: no model, no data, no network.")
@json_option
def command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    plot: Path | None,
    named: str | None,
    schema_only: bool,
    as_json: bool,
) -> None:
    """Validate RECIPE, find its model and data, and show what running it would take, the training schedule drawn.

    Downloads no weights: config, tokenizer and index are enough. Writes nothing but the FILE of --plot.
    """
    with failure_as_json(as_json, lambda: {"recipe": recipe_file.stem}):
        from nexus_core.recipe.load import load_recipe

        recipe = load_recipe(recipe_file, overrides)
        if plot:
            _draw(recipe, plot)
        if schema_only:
            if as_json:
                print_json({"status": "valid", "recipe": recipe.name})
            else:
                click.echo(f"{recipe_file}: valid; model and data were not looked at")
            return

        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.pipeline.inputs import check_inputs, check_splits
        from nexus_core.pipeline.outline import other_teacher, outline_recipe
        from nexus_core.pipeline.preflight import look_ahead

        checkpoint = open_checkpoint(recipe.model.path, recipe.model.revision, weights=False)
        check_inputs(recipe, checkpoint)
        teacher = other_teacher(recipe)
        outline = outline_recipe(recipe, checkpoint, teacher)
        check_splits(recipe, [stage.name for stage in outline.stages if not stage.is_reused])
        ahead = look_ahead(recipe, checkpoint, named, teacher=teacher)
    if as_json:
        print_json(_as_json(outline, ahead))
    else:
        click.echo("\n".join(_as_text(outline, ahead)))


def _as_json(outline: Outline, ahead: Preflight) -> dict[str, Any]:
    device = ahead.device
    return {
        "status": "valid",
        "recipe": outline.recipe.name,
        "model": {
            "path": outline.checkpoint.folder,
            "family": outline.checkpoint.family.name,
            "fingerprint": outline.fingerprint,
            "missing_weights": weights_as_json(ahead),
            "stored_bytes": ahead.model.stored_bytes,
            "trainable_parameters": ahead.trainable_parameters,
        },
        "device": {
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "available_bytes": device.available_bytes,
            "flops": device.flops,
            "bandwidth": device.bandwidth,
            "measured": device.measured,
            "host_bytes": ahead.host_bytes,
        },
        "disk": {
            "needs_bytes": ahead.disk_bytes,
            "download_bytes": ahead.download_bytes,
            "free_bytes": ahead.free_disk_bytes,
        },
        "fits": not ahead.misfits,
        "misfits": [
            {
                "stage": misfit.stage,
                "where": misfit.where,
                "needs_bytes": misfit.needs_bytes,
                "has_bytes": misfit.has_bytes,
                "ways_out": [
                    {"settings": list(way.settings), "needs_bytes": way.needs_bytes, "fits": way.fits}
                    for way in misfit.ways_out
                ],
            }
            for misfit in ahead.misfits
        ],
        "stages": stages_as_json(outline, ahead),
    }


def _as_text(outline: Outline, ahead: Preflight) -> list[str]:
    from nexus_core.pipeline.preflight import size

    model, stored = outline.checkpoint.description, sum(ahead.model.stored_bytes.values())
    parts = ", ".join(
        f"{part.replace('_', ' ')} {size(count)}" for part, count in ahead.model.stored_bytes.items() if count
    )
    lines = [
        f"{click.style(outline.recipe.name, bold=True)}: valid",
        "",
        f"model    {outline.checkpoint.name}  ({outline.checkpoint.family.name}, {model.storage})",
        f"         {len(model.layers)} layers x {model.experts} experts, {model.experts_per_token} per token; "
        f"hidden {model.hidden_size}, expert width {model.expert_width}",
        f"         {size(stored)} stored: {parts}",
        *weight_lines(ahead),
        f"trains   {ahead.trainable_parameters:,} parameters, one shared expert per layer",
        f"data     {_data(outline)}",
        f"device   {device_line(ahead)}",
        f"store    {outline.store}: about {size(ahead.stage_disk_bytes)} new, {size(ahead.free_disk_bytes)} free. Base "
        f"weights are linked; where links are impossible, 2 copies of {size(stored)} come on top",
        "",
        *stage_table(outline, ahead),
        "",
        *place_lines(outline),
        "",
        *memory_table(ahead, [stage.name for stage in outline.stages if stage.name in HOLD_MODEL]),
        "",
        *_schedule(outline),
    ]
    return lines + warnings(ahead)


def _draw(recipe: Recipe, file: Path) -> None:
    """Raises UsageError if the file cannot be written, or its ending names no kind of picture."""
    from nexus_core.errors import UsageError
    from nexus_core.stages.train import schedule_figure

    try:
        schedule_figure(recipe.train).savefig(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {file}: cannot be written: {error}; name a .png, .pdf or .svg file") from error
    click.echo(f"schedule drawn in {file}", err=True)


def _schedule(outline: Outline) -> list[str]:
    """Learning rate and temperature over the steps of training, as text."""
    from nexus_core.report.schedule import schedule_lines
    from nexus_core.train.schedule import Schedule

    schedule = Schedule.of(outline.recipe.train)
    steps = [schedule.at(step) for step in range(1, schedule.steps + 1)]
    lines = schedule_lines([step.learning_rate for step in steps], [step.temperature for step in steps])
    return [f"schedule of {schedule.steps:,} steps: first .. highest .. last", *(f"  {line}" for line in lines)]


def _data(outline: Outline) -> str:
    return "; ".join(
        f"{name}: {', '.join(source.path for source in sources)}" for name, sources in outline.recipe.data.items()
    )
