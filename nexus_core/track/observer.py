"""Records a run in MLflow: a parent run per recipe, a nested run per stage. An observer, nothing more."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.hookspecs import hookimpl
from nexus_core.recipe.schema import Tracking
from nexus_core.track.connection import artifact_location, connect, database_file, default_uri
from nexus_core.track.fields import field_name, flatten, headline, numbers, parameter_value, set_roles
from nexus_core.types import RunDescription, StageOutcome

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

# MLflow's limits for one call.
MAX_METRICS = 1000
MAX_PARAMETERS = 100

FLUSH_SECONDS = 5.0

# Reports are a few kilobytes; something larger that happens to end in .json is not one.
MAX_REPORT_BYTES = 5_000_000

log = logging.getLogger(__name__)


class MlflowObserver:
    """Records one run at a time, by default in `<store>/mlflow.db`, or at `run.tracking.uri`.

    Nothing here can fail a run: the first thing that goes wrong is said in one warning, and the rest of the run goes
    unrecorded: is_recording tells. Numbers of a step are buffered and written every few seconds, for one write costs
    tens of milliseconds.
    """

    def __init__(self, tracking: Tracking, store: Path):
        self.uri = tracking.uri or default_uri(store)
        self._experiment = tracking.experiment
        self._store = store
        self.is_recording = tracking.enabled
        self._connected: MlflowClient | None = None
        self._parent_id = ""
        self._run_ids: dict[str, str] = {}
        self._stages: list[StageOutcome] = []
        self._buffer: dict[str, list[Metric]] = defaultdict(list)
        self._last_step: dict[str, int] = {}
        self._flushed_at = time.monotonic()

    @hookimpl
    def nexus_run_started(self, run: RunDescription) -> None:
        self._record(lambda: self._start_run(run))

    @hookimpl
    def nexus_stage_started(self, stage: str, key: str, settings: Mapping[str, Any]) -> None:
        self._record(lambda: self._start_stage(stage, {"nexus.key": key, "reused": "false"}, settings))

    @hookimpl
    def nexus_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._record(lambda: self._take_step(stage, step, values))

    @hookimpl
    def nexus_stage_finished(self, outcome: StageOutcome) -> None:
        self._record(lambda: self._finish_stage(outcome))

    @hookimpl
    def nexus_stage_failed(self, stage: str, error: BaseException) -> None:
        self._record(lambda: self._fail_stage(stage, error))

    @hookimpl
    def nexus_run_finished(self, status: str) -> None:
        self._record(lambda: self._finish_run(status))

    def _record(self, write: Callable[[], None]) -> None:
        if not self.is_recording:
            return
        try:
            write()
        except Exception as error:  # MLflow raises its own, sqlalchemy's, requests' and the system's
            self.is_recording = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            log.warning(
                "tracking: %s cannot be written to (%s); the run goes on, the rest of it is not recorded in MLflow",
                self.uri,
                reason,
            )

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:
            self._connected = connect(self.uri)
        return self._connected

    def _start_run(self, run: RunDescription) -> None:
        experiment_id = self._experiment_id()
        self._end_abandoned_runs(experiment_id, run.recipe)
        learnt, kept = set_roles(run.settings)
        execution = run.execution
        tags = {
            "nexus.kind": "run",
            "nexus.recipe": run.recipe,
            "nexus.store": str(run.store),
            "nexus.learnt": json.dumps(learnt),
            "nexus.kept": json.dumps(kept),
            "nexus.host": socket.gethostname(),
            "nexus.pid": str(os.getpid()),
            "mlflow.source.name": run.recipe,
        }
        for kind in ("versions", "git"):
            tags |= {f"{kind}.{name}": parameter_value(value) for name, value in execution.get(kind, {}).items()}
        if "commit" in execution.get("git", {}):
            tags["mlflow.source.git.commit"] = execution["git"]["commit"]
        self._parent_id = self._client.create_run(experiment_id, tags=tags, run_name=run.recipe).info.run_id
        self._write_parameters(self._parent_id, run.settings)
        self._client.log_text(self._parent_id, run.source, "recipe/recipe.yaml")
        self._client.log_dict(self._parent_id, _plain(run.settings), "recipe/resolved.yaml")
        self._client.log_dict(self._parent_id, _plain(execution), "recipe/execution.yaml")

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                return self._client.create_experiment(self._experiment, artifact_location(self.uri, self._store))
            except Exception:  # a second run may have made it since
                experiment = self._client.get_experiment_by_name(self._experiment)
                if experiment is None:
                    raise
        return experiment.experiment_id

    def _end_abandoned_runs(self, experiment_id: str, recipe: str) -> None:
        """Runs of this recipe whose process was killed would show as running for ever."""
        if database_file(self.uri) is None:
            return  # others' runs are on a server too
        here = f"tags.`nexus.host` = '{socket.gethostname()}' and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([experiment_id], here):
            if run.data.tags.get("nexus.recipe") == recipe and not _is_alive(int(run.data.tags["nexus.pid"])):
                nested = f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and attributes.status = 'RUNNING'"
                for stage in self._client.search_runs([experiment_id], nested):
                    self._client.set_terminated(stage.info.run_id, "KILLED")
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _finish_run(self, status: str) -> None:
        for stage in list(self._run_ids):
            self._end_stage(stage, "KILLED")
        self._client.set_terminated(self._parent_id, "FINISHED" if status == "done" else "FAILED")

    def _start_stage(self, stage: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        experiment_id = self._client.get_run(self._parent_id).info.experiment_id
        nested = {"nexus.kind": "stage", "nexus.stage": stage, "mlflow.parentRunId": self._parent_id}
        run = self._client.create_run(experiment_id, tags=nested | dict(tags), run_name=stage)
        self._run_ids[stage] = run.info.run_id
        self._write_parameters(run.info.run_id, settings)

    def _take_step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._last_step[stage] = max(step, self._last_step.get(stage, 0))
        self._buffer[stage] += _metrics(numbers(values), step)
        if len(self._buffer[stage]) >= MAX_METRICS or time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for stage, metrics in self._buffer.items():
            if stage in self._run_ids:
                self._write_metrics(self._run_ids[stage], metrics)
        self._buffer.clear()
        self._flushed_at = time.monotonic()

    def _finish_stage(self, outcome: StageOutcome) -> None:
        if outcome.name not in self._run_ids:  # a reused stage never starts
            self._start_stage(outcome.name, {"nexus.key": outcome.key, "reused": str(outcome.reused).lower()}, {})
        run_id = self._run_ids[outcome.name]
        self._flush()
        self._client.set_tag(run_id, "nexus.path", str(outcome.path))
        final = numbers(outcome.metrics)
        self._write_metrics(
            run_id, _metrics(final | {"seconds": outcome.seconds}, self._last_step.get(outcome.name, 0))
        )
        for name, value in outcome.metrics.items():
            if isinstance(value, str):
                self._client.set_tag(run_id, field_name(name), parameter_value(value))
        if not outcome.reused:
            for artifact in artifacts(outcome.path):
                folder = artifact.parent.relative_to(outcome.path).as_posix()
                self._client.log_artifact(run_id, str(artifact), "" if folder == "." else folder)
        self._tell_parent(outcome)
        self._end_stage(outcome.name, "FINISHED")

    def _tell_parent(self, outcome: StageOutcome) -> None:
        """The parent holds every stage's final numbers, so that runs are compared without reading nested ones."""
        summary = headline(outcome.name, outcome.metrics) | {f"seconds/{outcome.name}": outcome.seconds}
        self._write_metrics(self._parent_id, _metrics(summary, 0))
        self._stages.append(outcome)
        tags = {
            "nexus.stages": json.dumps([stage.name for stage in self._stages]),
            "nexus.reused": json.dumps([stage.name for stage in self._stages if stage.reused]),
        }
        if "verdict" in outcome.metrics:
            tags["verdict"] = parameter_value(outcome.metrics["verdict"])
        for name, value in tags.items():
            self._client.set_tag(self._parent_id, name, value)

    def _fail_stage(self, stage: str, error: BaseException) -> None:
        if stage not in self._run_ids:
            return
        message = parameter_value(f"{type(error).__name__}: {error}")
        for run_id in (self._run_ids[stage], self._parent_id):
            self._client.set_tag(run_id, "error", message)
        self._end_stage(stage, "FAILED" if isinstance(error, Exception) else "KILLED")

    def _end_stage(self, stage: str, status: str) -> None:
        self._flush()
        self._client.set_terminated(self._run_ids.pop(stage), status)

    def _write_parameters(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(field_name(name), parameter_value(value)) for name, value in flatten(settings).items()]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self._client.log_batch(run_id, params=parameters[start : start + MAX_PARAMETERS])

    def _write_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def artifacts(folder: Path) -> Iterator[Path]:
    """A stage's pictures, reports and step log, by name; never weights or a model's own files."""
    is_model = (folder / "config.json").exists()
    patterns = ["*.png", "*/*.png", "metrics.jsonl", *(["*report.json", "stage.json"] if is_model else ["*.json"])]
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_file() and path.stat().st_size <= MAX_REPORT_BYTES:
            yield path


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, value, now, step) for name, value in values.items()]


def _plain(value: Any) -> Any:
    """The same with mappings as dicts, sequences as lists and what YAML does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
