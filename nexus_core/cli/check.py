"""`nexus check`: everything that can be known about a recipe before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.output import failure_as_json, json_option, print_json, set_option

if TYPE_CHECKING:
    from nexus_core.pipeline.plan import Plan
    from nexus_core.pipeline.preflight import Estimate
    from nexus_core.recipe.schema import Recipe


@click.command("check")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the training schedule into FILE (png, pdf, svg).",
)
@click.option("--schema-only", is_flag=True, help="Look at the recipe alone: no model, no data, no network.")
@json_option
def command(recipe_file: Path, overrides: tuple[str, ...], plot: Path | None, schema_only: bool, as_json: bool) -> None:
    """Validate RECIPE, find its model and data, and show what running it would take, the training schedule drawn.

    Writes nothing but the FILE of --plot.
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
        from nexus_core.models import choose_device
        from nexus_core.pipeline.plan import plan_recipe
        from nexus_core.pipeline.preflight import check_inputs, device_memory_bytes, estimate, free_disk_bytes

        checkpoint = open_checkpoint(recipe.model.path, recipe.model.revision)
        check_inputs(recipe, checkpoint)
        plan = plan_recipe(recipe, checkpoint=checkpoint)
        needed = estimate(recipe, checkpoint)
        device = choose_device(recipe.run.device)
        memory, disk = device_memory_bytes(device), free_disk_bytes(plan.store.root)
    if as_json:
        print_json(_as_json(plan, needed, device, memory, disk))
    else:
        click.echo("\n".join(_as_text(plan, needed, device, memory, disk)))


def _as_json(plan: Plan, needed: Estimate, device: str, memory: int, disk: int) -> dict[str, Any]:
    return {
        "status": "valid",
        "recipe": plan.recipe.name,
        "model": {
            "path": plan.checkpoint.folder,
            "family": plan.checkpoint.family.name,
            "fingerprint": plan.fingerprint,
            "stored_bytes": needed.stored_bytes,
            "trainable_parameters": needed.trainable_parameters,
        },
        "device": {"name": device, "memory_bytes": memory},
        "needs": {"memory_bytes": needed.memory_bytes, "disk_bytes": needed.disk_bytes, "free_disk_bytes": disk},
        "stages": {
            step.stage.name: {
                "key": step.key,
                "path": step.path,
                "reused": step.found is not None,
                "tokens": needed.tokens.get(step.stage.name),
            }
            for step in plan.steps
        },
    }


def _as_text(plan: Plan, needed: Estimate, device: str, memory: int, disk: int) -> list[str]:
    model, stored = plan.checkpoint.description, sum(needed.stored_bytes.values())
    parts = ", ".join(f"{part.replace('_', ' ')} {size(count)}" for part, count in needed.stored_bytes.items() if count)
    lines = [
        f"{click.style(plan.recipe.name, bold=True)}: valid",
        "",
        f"model    {plan.checkpoint.name}  ({plan.checkpoint.family.name}, {model.storage})",
        f"         {len(model.layers)} layers x {model.experts} experts, {model.experts_per_token} per token; "
        f"hidden {model.hidden_size}, expert width {model.expert_width}",
        f"         {size(stored)} stored: {parts}",
        f"trains   {needed.trainable_parameters:,} parameters, one shared expert per layer",
        f"data     {_data(plan)}",
        f"device   {device}",
        "",
        "stages",
    ]
    for step in plan.steps:
        tokens = needed.tokens.get(step.stage.name)
        work = f"{tokens:,} tokens" + (" at most" if step.stage.name == "validate" else "") if tokens else ""
        lines.append(f"  {step.stage.name:<9} {'reused' if step.found else 'runs':<7} {step.path}  {work}".rstrip())
    lines += [
        "",
        *_schedule(plan),
        "",
        f"memory   about {size(needed.memory_bytes)} to train, without activations; {device} has {size(memory)}",
        f"disk     about {size(needed.disk_bytes)} new in {plan.store.root}; {size(disk)} free. "
        f"Base weights are linked; where links are impossible, 2 copies of {size(stored)} come on top",
    ]
    if needed.memory_bytes > memory:
        lines.append(click.style("warning: that is more memory than there is", fg="yellow"))
    if needed.disk_bytes > disk:
        lines.append(click.style("warning: that is more disk than is free", fg="yellow"))
    return lines


def _draw(recipe: Recipe, file: Path) -> None:
    """Raises UsageError if the file cannot be written, or its ending names no kind of picture."""
    from nexus_core.errors import UsageError
    from nexus_core.stages.train import schedule_figure

    try:
        schedule_figure(recipe.train).savefig(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {file}: cannot be written: {error}; name a .png, .pdf or .svg file") from error
    click.echo(f"schedule drawn in {file}", err=True)


def _schedule(plan: Plan) -> list[str]:
    """Learning rate and temperature over the steps of training, as text."""
    from nexus_core.report.schedule import schedule_lines
    from nexus_core.train.schedule import Schedule

    schedule = Schedule.of(plan.recipe.train)
    steps = [schedule.at(step) for step in range(1, schedule.steps + 1)]
    lines = schedule_lines([step.learning_rate for step in steps], [step.temperature for step in steps])
    return [f"schedule of {schedule.steps:,} steps: first .. highest .. last", *(f"  {line}" for line in lines)]


def _data(plan: Plan) -> str:
    return "; ".join(
        f"{name}: {', '.join(source.path for source in sources)}" for name, sources in plan.recipe.data.items()
    )


def size(count: int) -> str:
    """Bytes in the decimal units that disks are sold in."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"
