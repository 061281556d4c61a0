"""`nexus run`: a recipe from data to verdict, reusing what is there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.launch import LAUNCHER, is_to_launch, launch, own_command, processes_option, stopped_by_launcher
from nexus_core.cli.options import json_option, set_option
from nexus_core.cli.output import failure_as_json, print_json
from nexus_core.processes import World, join, leave

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
@click.option("--anyway", is_flag=True, help="Start even what needs more memory than there is, by its estimate.")
@processes_option
@json_option
def command(
    recipe_file: Path,
    overrides: tuple[str, ...],
    until: str | None,
    rerun: tuple[str, ...],
    verify: bool,
    anyway: bool,
    processes: int | None,
    as_json: bool,
) -> int:
    """Run RECIPE: every stage whose output is not there yet.

    Interrupted or killed, the same command goes on where it stopped.
    """
    outcomes: list[StageOutcome] = []

    def so_far() -> dict[str, Any]:
        return {"recipe": recipe_file.stem, "stages": _stages(outcomes)}

    with failure_as_json(as_json, so_far), _terminated_as_interrupted():
        from nexus_core.recipe.load import load_recipe

        here = join()
        recipe = load_recipe(recipe_file, overrides)
        starts_others = is_to_launch(processes, recipe.run.processes)
        if not starts_others:
            from nexus_core.pipeline.run import run_recipe

            with _tracked(recipe, here) as is_tracked:
                result = run_recipe(
                    recipe, until=until, rerun=rerun, verify=verify, anyway=anyway, on_outcome=outcomes.append
                )
            leave()
    if starts_others:
        return launch(processes or recipe.run.processes, own_command(), as_json=as_json)
    if here.is_first and as_json:
        print_json({"status": "done", **so_far()})
    elif here.is_first:
        from nexus_core.cli.summary import summary

        click.echo(summary(result, is_tracked=is_tracked()))
    return 0


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
def _tracked(recipe: Recipe, here: World) -> Iterator[Callable[[], bool]]:
    """Have MLflow observe what happens inside, if the recipe wants that; tells whether all of it could be recorded."""
    if not (recipe.run.tracking.enabled and here.is_first):
        yield lambda: False
        return
    from nexus_core.plugins import installed
    from nexus_core.track.observer import MlflowObserver

    plugins = installed()
    observer = MlflowObserver(recipe.run.tracking, Path(recipe.run.store).expanduser())
    plugins.register(observer, "mlflow", "built in")
    try:
        yield lambda: observer.is_recording
    finally:
        plugins.unregister("mlflow")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A batch system's polite SIGTERM ends a run as Ctrl-C does: told to observers, partial work kept."""
    handler = stopped_by_launcher if LAUNCHER in os.environ else signal.default_int_handler
    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: called from another program, which has its own way
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
