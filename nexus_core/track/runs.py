"""Runs read back from MLflow, newest first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nexus_core.errors import UsageError, suggestion
from nexus_core.track.connection import connect, database_file
from nexus_core.types import RecordedRun

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUNS_PER_PAGE = 200

# Shorter beginnings of a run's id would be guesses.
MIN_ID_CHARACTERS = 4


def recorded_runs(uri: str, experiment: str | None = None) -> list[RecordedRun]:
    """All recipes' runs at a tracking URI, newest first; of one experiment, or of all.

    Raises UsageError if there is no database, the server does not answer, or the experiment is unknown.
    """
    database = database_file(uri)
    if database is not None and not database.exists():
        raise UsageError(
            f"{database}: no runs are recorded there; record one with 'nexus run RECIPE', or name another place with "
            "--store or --uri"
        )
    try:
        if database is not None:
            # MLflow would try again for minutes what cannot be opened.
            database.open("rb").close()
        client = connect(uri)
        experiments = {found.name: found.experiment_id for found in client.search_experiments()}
        if experiment is not None:
            if experiment not in experiments:
                raise UsageError(f"{uri}: has no experiment '{experiment}'{suggestion(experiment, experiments)}")
            experiments = {experiment: experiments[experiment]}
        return [_recorded(run) for run in _parent_runs(client, list(experiments.values()))]
    except UsageError:
        raise
    except Exception as error:  # MLflow raises its own, sqlalchemy's, requests' and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UsageError(
            f"{uri}: recorded runs cannot be read: {reason}; name another place with --store or --uri"
        ) from error


def choose(runs: list[RecordedRun], named: tuple[str, ...], last: int | None = None) -> list[RecordedRun]:
    """The runs to compare, oldest first.

    runs: newest first. named: recipe names (their newest finished run) or beginnings of run ids, kept in this order;
    none: the newest finished run of each recipe, or with `last` the newest finished runs of any.
    Raises UsageError for a name that nothing has, and if nothing has finished.
    """
    if named:
        return [_named(runs, name) for name in named]
    finished = [run for run in runs if run.status == "FINISHED"]
    if not finished:
        unfinished = f"; {len(runs)} began and did not finish" if runs else ""
        raise UsageError(f"no finished run is recorded{unfinished}: 'nexus run RECIPE' records one")
    if last is None:
        newest: dict[str, RecordedRun] = {}
        for run in finished:
            newest.setdefault(run.name, run)
        finished = list(newest.values())
    return finished[:last][::-1]


def _named(runs: list[RecordedRun], name: str) -> RecordedRun:
    of_recipe = [run for run in runs if run.name == name]
    if of_recipe:
        return next((run for run in of_recipe if run.status == "FINISHED"), of_recipe[0])
    by_id = [run for run in runs if len(name) >= MIN_ID_CHARACTERS and run.run_id.startswith(name)]
    if len(by_id) == 1:
        return by_id[0]
    if by_id:
        raise UsageError(f"'{name}' begins the ids of {len(by_id)} runs; give more of it")
    raise UsageError(
        f"no recorded run has the recipe name or id '{name}'{suggestion(name, {run.name for run in runs})}"
    )


def _parent_runs(client: MlflowClient, experiment_ids: list[str]) -> Iterator[Run]:
    page_token = None
    while True:
        page = client.search_runs(
            experiment_ids,
            "tags.`nexus.kind` = 'run'",
            max_results=RUNS_PER_PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=page_token,
        )
        yield from page
        page_token = page.token
        if not page_token:
            return


def _recorded(run: Run) -> RecordedRun:
    tags = run.data.tags
    return RecordedRun(
        run_id=run.info.run_id,
        name=tags.get("nexus.recipe", run.info.run_name),
        status=run.info.status,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        settings=run.data.params,
        metrics=run.data.metrics,
        learnt=_names(tags, "nexus.learnt"),
        kept=_names(tags, "nexus.kept"),
        stages=_names(tags, "nexus.stages"),
        reused=_names(tags, "nexus.reused"),
        verdict=tags.get("verdict", ""),
    )


def _names(tags: dict[str, str], tag: str) -> tuple[str, ...]:
    return tuple(json.loads(tags.get(tag, "[]")))
