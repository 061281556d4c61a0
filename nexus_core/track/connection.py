"""The one door to MLflow: quiet, without telemetry, and a database that is whole or not there."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "mlartifacts"
SQLITE = "sqlite:///"

# Set only where the user has not: a server that does not answer may cost seconds, not MLflow's default minutes.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def default_uri(store: Path) -> str:
    """The tracking URI of a run store: an sqlite file in it."""
    return f"{SQLITE}{store.resolve() / DATABASE_NAME}"


def database_file(uri: str) -> Path | None:
    """The file behind an sqlite URI, None for a server."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def artifact_location(uri: str, store: Path) -> str | None:
    """Where artifacts of a new experiment go: into the store for an sqlite file, else where the server wants them."""
    return (store.resolve() / ARTIFACTS_NAME).as_uri() if database_file(uri) else None


def connect(uri: str) -> MlflowClient:
    """A client for this tracking URI. An sqlite file that is missing is made; a server is not contacted yet."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    # MLflow tells every table it creates; standard error is for the run's own progress.
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    database = database_file(uri)
    if database is not None and not database.exists():
        _create(database)
    return MlflowClient(tracking_uri=uri)


def _create(database: Path) -> None:
    # MLflow builds its tables by some fifty migrations. A process killed between two of them would leave a file that
    # MLflow refuses ever after, so the file gets its name only when it is complete.
    from mlflow.tracking import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    fresh = database.with_name(f".{database.name}.{os.getpid()}")
    try:
        MlflowClient(tracking_uri=f"{SQLITE}{fresh}").search_experiments(max_results=1)
        # A link, unlike a rename, never replaces the file that a second run has just put there.
        os.link(fresh, database)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        fresh.rename(database)
    finally:
        fresh.unlink(missing_ok=True)
