"""The key of a stage's output: a hash of everything it depends on, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from nexus_core.checkpoint.fingerprint import content_digest, digest
from nexus_core.data.records import locate
from nexus_core.errors import CheckpointError, DataError
from nexus_core.recipe.schema import GENERATED, Recipe
from nexus_core.stages.stage import Stage

KEY_DIGITS = 16

# A text edited in place often keeps its size, so data files are read whole as long as that takes about a second.
WHOLE_DATA_BYTES = 2**30


@dataclass(frozen=True)
class Ingredients:
    """What one stage's output depends on.

    settings: what the stage says of the recipe, with data paths as the user wrote them. data: each of those paths
    with what lies there; in the key the content stands in the path's place, so a moved file changes nothing. inputs:
    keys of the stages it reads, by name. model: fingerprint of the checkpoint and the computation's type.
    """

    stage: str
    version: int
    settings: Mapping[str, Any]
    data: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        whole = asdict(self) | {"settings": _by_content(self.settings, self.data)}
        del whole["data"]
        return digest(whole)[:KEY_DIGITS]


def ingredients(
    stage: Stage, recipe: Recipe, inputs: Mapping[str, str], model: Mapping[str, str], *, verify: bool = False
) -> Ingredients:
    """What `stage` depends on under this recipe. Raises DataError if a data file is missing or unreadable."""
    # Through JSON once, so that what is hashed now and what is read back from stage.json later compare equal.
    settings = json.loads(json.dumps(stage.settings(recipe)))
    data = {
        source["path"]: data_identity(source["path"], source.get("revision"), verify=verify)
        for source in _sources(settings)
    }
    return Ingredients(stage.name, stage.version, settings, data, dict(inputs), dict(model))


@lru_cache(maxsize=256)
def data_identity(path: str, revision: str | None = None, *, verify: bool = False) -> str:
    """What lies at a data path: the content of a file, folder or embedded set, or the Hub's name and revision of it.

    The file's ending is part of it, because it decides how the file is read. Raises DataError if nothing is there.
    """
    if path.startswith(GENERATED):
        return path  # the key of the stage that writes it is among the inputs
    place = locate(path)
    if place is None:
        return f"hub:{path}@{revision or 'main'}"
    try:
        if place.is_file():
            return f"{place.suffix}:{content_digest(place, whole_up_to=WHOLE_DATA_BYTES, verify=verify)}"
        contents = {
            str(file.relative_to(place)): content_digest(file, whole_up_to=WHOLE_DATA_BYTES, verify=verify)
            for file in sorted(place.rglob("*"))
            if file.is_file()
        }
    except CheckpointError as error:
        raise DataError(str(error)) from error
    return f"folder:{digest(contents)}"


def _sources(settings: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping inside the settings that names data: one with a text under `path`."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("path"), str):
            yield settings
        for value in settings.values():
            yield from _sources(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _sources(value)


def _by_content(settings: Any, data: Mapping[str, str]) -> Any:
    if isinstance(settings, Mapping):
        return {
            name: data[value] if name == "path" and value in data else _by_content(value, data)
            for name, value in settings.items()
        }
    if isinstance(settings, list):
        return [_by_content(value, data) for value in settings]
    return settings
