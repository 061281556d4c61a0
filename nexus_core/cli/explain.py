"""`nexus explain`: why a stage would be reused, or why not."""

from __future__ import annotations

from pathlib import Path

import click

from nexus_core.cli.options import json_option, set_option
from nexus_core.cli.output import failure_as_json, print_json


@click.command("explain")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@set_option
@click.option("--verify", is_flag=True, help="As `nexus run --verify` would see it.")
@json_option
def command(recipe_file: Path, overrides: tuple[str, ...], verify: bool, as_json: bool) -> None:
    """Say for each stage of RECIPE whether it would be reused, and if not, what changed since the nearest output."""
    with failure_as_json(as_json, lambda: {"recipe": recipe_file.stem}):
        from nexus_core.pipeline.explain import explain
        from nexus_core.pipeline.plan import plan_recipe
        from nexus_core.recipe.load import load_recipe

        recipe = load_recipe(recipe_file, overrides)
        explanations = explain(plan_recipe(recipe, verify=verify))
    if as_json:
        stages = {
            item.stage: {
                "key": item.key,
                "path": item.path,
                "reused": item.reused,
                "reasons": item.reasons,
                "compared_with": item.compared_with,
            }
            for item in explanations
        }
        print_json({"status": "done", "recipe": recipe.name, "stages": stages})
        return
    for item in explanations:
        if item.reused:
            click.echo(f"{item.stage:<9} reused   {item.path}")
            continue
        compared = f"  (compared with {item.compared_with})" if item.compared_with else ""
        click.echo(f"{item.stage:<9} runs     {item.path}{compared}")
        for reason in item.reasons:
            click.echo(f"{'':<9} because  {reason}")
