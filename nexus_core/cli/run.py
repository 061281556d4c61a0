"""`nexus run`: a recipe from data to verdict, reusing what is there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.output import failure_as_json, json_option, print_json, set_option

if TYPE_CHECKING:
    from nexus_core.recipe.schema import Recipe
    from nexus_core.types import StageOutcome


@click.command("run")
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@set_option
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option(
    "--rerun", metavar="STAGE", multiple=True, help="Run this stage, and those that read it, again; may be given again."
)
@click.option("--verify", is_flag=True, help="Read every byte of the model to tell it from others, not samples.")
@json_option
def command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    until: str | None,
    rerun: tuple[str, ...],
    verify: bool,
    as_json: bool,
) -> None:
    """Run RECIPE: every stage whose output is not there yet.

    Interrupted or killed, the same command goes on where it stopped.
    """
    outcomes: list[StageOutcome] = []

    def so_far() -> dict[str, Any]:
        return {"recipe": recipe_file.stem, "stages": _stages(outcomes)}

    with failure_as_json(as_json, so_far), _terminated_as_interrupted():
        from nexus_core.cli.summary import summary
        from nexus_core.pipeline.run import run_recipe
        from nexus_core.recipe.load import load_recipe

        recipe = load_recipe(recipe_file, overrides)
        with _tracked(recipe):
            result = run_recipe(recipe, until=until, rerun=rerun, verify=verify, on_outcome=outcomes.append)
    if as_json:
        print_json({"status": "done", **so_far()})
    else:
        click.echo(summary(result))


def _stages(outcomes: list[StageOutcome]) -> dict[str, Any]:
    return {
        outcome.name: {
            "path": outcome.path,
            "reused": outcome.reused,
            "seconds": outcome.seconds,
            "metrics": outcome.metrics,
        }
        for outcome in outcomes
    }


@contextmanager
def _tracked(recipe: Recipe) -> Iterator[None]:
    """Have MLflow observe what happens inside, if the recipe wants that."""
    if not recipe.run.tracking.enabled:
        yield
        return
    from nexus_core.plugins import installed
    from nexus_core.track.observer import MlflowObserver

    plugins = installed()
    observer = MlflowObserver(recipe.run.tracking, Path(recipe.run.store).expanduser())
    plugins.register(observer, "mlflow", "built in")
    try:
        yield
    finally:
        plugins.unregister("mlflow")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A batch system's polite SIGTERM ends a run as Ctrl-C does: told to observers, partial work kept."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: called from another program, which has its own way
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
