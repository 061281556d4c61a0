"""`nexus doctor`: whether a model is whole and sound, and how fast every stage is with it here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.options import device_option, dtype_option, json_option, revision_option
from nexus_core.cli.output import failure_as_json, print_json

if TYPE_CHECKING:
    from nexus_core.pipeline.doctor import Report


@click.command("doctor")
@click.argument("model")
@click.option("--data", metavar="FILE", multiple=True, help="Text to read; by default what comes with NEXUS.")
@click.option(
    "--recipe",
    "recipe_file",
    metavar="RECIPE",
    type=click.Path(path_type=Path),
    help="Rehearse at this recipe's sizes, and tell the hours of its tokens.",
)
@dtype_option
@device_option
@click.option("--quick", is_flag=True, help="Sample the weights instead of reading every byte.")
@revision_option
@json_option
def command(
    model: str,
    data: tuple[str, ...],
    recipe_file: Path | None,
    device: str,
    dtype: str,
    quick: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Look MODEL over: names, shapes and numbers of all tensors, perplexity on text, and a few steps of each stage.

    MODEL is a base, converted or trained model: a folder, a Hub id or embedded:NAME. Writes nothing.
    """
    with failure_as_json(as_json, lambda: {"model": model, "verdict": "unusable"}):
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.models import choose_device
        from nexus_core.pipeline.doctor import examine
        from nexus_core.recipe.load import load_recipe
        from nexus_core.recipe.schema import Source

        report = examine(
            open_checkpoint(model, revision),
            sources=[Source(path=path) for path in data],
            recipe=load_recipe(recipe_file, ()) if recipe_file else None,
            device=choose_device(device),
            dtype=dtype,
            verify=not quick,
            say=(lambda line: None) if as_json else click.echo,
        )
    if as_json:
        print_json(_as_json(report))
        return
    color = "yellow" if report.warnings else "green"
    click.echo(f"verdict  {click.style(report.verdict, fg=color)}")


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "status": "done",
        **asdict(report),
        "hours": report.hours,
        "verdict": report.verdict,
    }
