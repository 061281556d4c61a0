"""The end of a run in a few lines: what was gained, what was forgotten, where things lie, what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nexus_core.pipeline.run import RunResult
from nexus_core.pipeline.store import LATEST
from nexus_core.progress import clock
from nexus_core.recipe.schema import Recipe
from nexus_core.track.connection import default_uri


def summary(result: RunResult, *, is_tracked: bool) -> str:
    """Text for a terminal; plain when stdout is not one, as click strips styles there.

    is_tracked: whether MLflow has the run, so that it is worth looking there.
    """
    parts = [_times(result), _measured(result), _places(result, is_tracked), _next(result, is_tracked)]
    return "\n" + "\n\n".join("\n".join(part) for part in parts if part)


def _times(result: RunResult) -> list[str]:
    ran = [outcome for outcome in result.outcomes if not outcome.reused]
    count = f"{len(ran)} stage{'s' if len(ran) > 1 else ''}"
    spent = f"{count} in {clock(sum(outcome.seconds for outcome in ran))}" if ran else "no stage had to run"
    reused = len(result.outcomes) - len(ran)
    return [click.style(result.recipe.name, bold=True) + f"  {spent}" + (f", {reused} reused" if reused else "")]


def _measured(result: RunResult) -> list[str]:
    """Perplexity of each set, base against student, learnt sets first, and the verdict."""
    outcome = result.outcome("validate")
    if outcome is None:
        return []
    metrics, recipe = outcome.metrics, result.recipe
    names = [name.split("/")[1] for name in metrics if name.startswith("perplexity/") and name.endswith("/student")]
    names.sort(key=lambda name: (name not in recipe.learnt_sets, name))
    width = max([len(name) for name in names] + [10])
    lines = [f"{'perplexity':<{width}}  {'base':>10}  {'student':>10}  change"]
    for name in names:
        base, student = metrics[f"perplexity/{name}/base"], metrics[f"perplexity/{name}/student"]
        change, meaning = _change(metrics, name), "learnt" if name in recipe.learnt_sets else "kept"
        lines.append(f"{name:<{width}}  {_number(base)}  {_number(student)}  {change:<8} {meaning}")
    router = [
        f"{words} {metrics[name]:.3g}"
        for name, words in (("router/l1", "L1 distance from the base"), ("router/entropy", "entropy"))
        if isinstance(metrics.get(name), float | int)
    ]
    if router:
        lines.append(f"router: {', '.join(router)}")
    if "verdict" in metrics:
        lines.append(f"verdict: {click.style(str(metrics['verdict']), bold=True)}")
    return lines


def _change(metrics: Mapping[str, Any], name: str) -> str:
    relative = metrics.get(f"change/{name}")
    return f"{100 * relative:+.1f}%" if isinstance(relative, float | int) else ""


def _number(value: float | int | str) -> str:
    return f"{value:>10.4g}" if isinstance(value, float | int) else f"{value:>10}"


def _places(result: RunResult, is_tracked: bool) -> list[str]:
    store, recipe = Path(result.recipe.run.store).expanduser(), result.recipe
    latest = store / LATEST / recipe.name
    lines = []
    model = model_folder(result)
    if model:
        lines.append(f"model    {model}")
    if result.outcome("validate"):
        lines.append(f"report   {latest / 'validate' / 'report.json'}")
    if not lines and result.outcomes:
        lines.append(f"output   {latest / result.outcomes[-1].name}")
    if is_tracked:
        lines.append(f"MLflow   {_where_tracked(recipe, store)}")
    return lines


def model_folder(result: RunResult) -> Path | None:
    """The best model of a run to load: the trained one, else the converted one, by its short name in `latest`."""
    latest = Path(result.recipe.run.store).expanduser() / LATEST / result.recipe.name
    for stage, inside in (("train", "model"), ("convert", ".")):
        outcome = result.outcome(stage)
        if outcome is not None:
            # Where the file system has no links, the output's own place.
            return (latest / stage if (latest / stage).exists() else outcome.path) / inside
    return None


def _where_tracked(recipe: Recipe, store: Path) -> str:
    """A server's address, which a browser opens, or the command that shows what a file holds."""
    uri = recipe.run.tracking.uri or default_uri(store)
    return uri if uri.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _next(result: RunResult, is_tracked: bool) -> list[str]:
    model = model_folder(result)
    if model is None:
        return []
    lines = ["next:", f"  nexus chat {shlex.quote(str(model))}"]
    if result.outcome("validate") and is_tracked:
        run = result.recipe.run
        place = f"--uri {shlex.quote(run.tracking.uri)}" if run.tracking.uri else f"--store {shlex.quote(run.store)}"
        lines.append(f"  nexus compare {place}")
    return lines
