"""Where stages' outputs lie: `<store>/<stage>/<key>/`, each either whole or not there.

An output is filled in a partial folder beside its place and renamed when it is whole, so no reader ever sees half of
one, and a run that is killed anywhere leaves nothing that could be mistaken for a result. `stage.json` inside says
what it was made from. `<store>/latest/<recipe>/<stage>` points at what a recipe used last.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nexus_core.checkpoint.writer import remove_partial_files, sync_folder
from nexus_core.pipeline.disk import atomic_folder, storage_errors
from nexus_core.pipeline.keys import Ingredients
from nexus_core.pipeline.locks import exclusive

__all__ = ["STAGE_FILE", "StageRecord", "Store", "atomic_folder", "plain", "read_record"]

STAGE_FILE = "stage.json"
LATEST = "latest"


@dataclass(frozen=True)
class StageRecord:
    """What `stage.json` says of an output: what it was made from, when, with what, and its final numbers.

    backends: which implementation did which part of the work, as far as the family tells.
    """

    name: str
    key: str
    version: int
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    inputs: Mapping[str, str]
    model: Mapping[str, str]
    seconds: float
    metrics: Mapping[str, float | int | str]
    created: str
    versions: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)


class Store:
    """The outputs under one folder. Nothing is created before something is written."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def place(self, stage: str, key: str) -> Path:
        """Where an output lies once it is whole."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> StageRecord | None:
        """The record of a whole output, None if there is none."""
        return read_record(self.place(stage, key))

    def records(self, stage: str) -> list[StageRecord]:
        """All whole outputs of a stage, newest first."""
        folder = self.root / stage
        # What is being written, or was when its process was killed, has a name that begins with a point.
        found = [read_record(child) for child in folder.glob("[!.]*")] if folder.is_dir() else []
        return sorted((record for record in found if record), key=lambda record: record.created, reverse=True)

    @contextmanager
    def writing(self, stage: str, key: str, tell: Callable[[str], None]) -> Iterator[None]:
        """Only this process writes this output inside; `tell` is told who does while it has to wait.

        Raises UsageError if the store cannot be written, StageError if the disk is full.
        """
        with storage_errors(self.root, self._advice):
            (self.root / stage).mkdir(parents=True, exist_ok=True)
            with exclusive(self._beside(stage, key, "lock"), tell):
                self._recover(stage, key)
                yield

    def partial(self, stage: str, key: str, *, resumes: bool) -> Path:
        """The folder to fill; with `resumes` it still holds what an interrupted try wrote, else it is empty."""
        folder = self._beside(stage, key, "partial")
        with storage_errors(self.root, self._advice):
            if not resumes:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STAGE_FILE).unlink(missing_ok=True)
        return folder

    def finish(
        self,
        ingredients: Ingredients,
        *,
        seconds: float,
        metrics: Mapping[str, float | int | str],
        created: str,
        versions: Mapping[str, str],
        backends: Mapping[str, str],
    ) -> StageRecord:
        """Write the record into the partial folder and put it in its place, over an older output of the same key."""
        stage, key = ingredients.stage, ingredients.key
        partial, place, old = (
            self._beside(stage, key, "partial"),
            self.place(stage, key),
            self._beside(stage, key, "old"),
        )
        record = StageRecord(
            name=stage,
            key=key,
            version=ingredients.version,
            settings=ingredients.settings,
            data=ingredients.data,
            inputs=ingredients.inputs,
            model=ingredients.model,
            seconds=round(seconds, 3),
            metrics=plain(metrics),
            created=created,
            versions=versions,
            backends=backends,
        )
        with storage_errors(self.root, self._advice):
            remove_partial_files(partial)
            (partial / STAGE_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n")
            # The rename must not reach the disk before the content does.
            sync_folder(partial)
            if place.exists():
                place.rename(old)
            partial.rename(place)
            sync_folder(place.parent, recursive=False)
            shutil.rmtree(old, ignore_errors=True)
        return record

    def point_latest(self, recipe: str, stage: str, key: str) -> None:
        """Let `latest/<recipe>/<stage>` point at this output; a file system without links goes without."""
        link = self.root / LATEST / recipe / stage
        target = os.path.relpath(self.place(stage, key), link.parent)
        if link.is_symlink() and os.readlink(link) == target:  # noqa: PTH115 - compared with text
            return
        with storage_errors(self.root, self._advice):
            link.parent.mkdir(parents=True, exist_ok=True)
            beside = link.with_name(f".{stage}.{os.getpid()}")
            beside.unlink(missing_ok=True)
            with suppress(OSError):
                beside.symlink_to(target)
                beside.replace(link)

    def _beside(self, stage: str, key: str, ending: str) -> Path:
        return self.root / stage / f".{key}.{ending}"

    def _recover(self, stage: str, key: str) -> None:
        """Finish or undo a replacement that was killed between its two renames."""
        old, place = self._beside(stage, key, "old"), self.place(stage, key)
        if old.is_dir() and not place.exists():
            old.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def _advice(self) -> str:
        return (
            f"free some space, for example by deleting outputs you no longer need under {self.root}, "
            "and type the same command again"
        )


def read_record(folder: Path) -> StageRecord | None:
    """The record of a stage's output folder; None if it is not there, not whole, or not readable as one."""
    try:
        content = json.loads((folder / STAGE_FILE).read_text())
        return StageRecord(**{item.name: content[item.name] for item in fields(StageRecord)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Final numbers as JSON can hold them: arrays' scalars as Python's, what is not finite as text."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
