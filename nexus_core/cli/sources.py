"""Data sets as commands take them: `NAME=FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_core.recipe.schema import Records, Source


def named_sources(given: tuple[str, ...], flag: str, held_out: float = 0.0) -> dict[str, list[Source]]:
    """Data sets by name from `NAME=FILE` flags. held_out: share of each file's records that is kept from training.

    Raises UsageError for a flag of another shape.
    """
    from nexus_core.errors import UsageError
    from nexus_core.recipe.schema import Source

    sets: dict[str, list[Source]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{flag} {text}: write NAME=FILE, for example {flag} general=general.txt")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"{flag} {text}: a name is made of letters, digits, '_' and '-'; rename '{name}'")
        sets.setdefault(name, []).append(Source(path=path, held_out=held_out))
    return sets


def learnt_and_kept(
    learn: tuple[str, ...], keep: tuple[str, ...], held_out: float
) -> tuple[dict[str, list[Source]], dict[str, list[Source]]]:
    """The data sets of `--learn` and those of `--keep`. Raises UsageError if one is given to both."""
    from nexus_core.errors import UsageError

    learnt, kept = named_sources(learn, "--learn", held_out), named_sources(keep, "--keep", held_out)
    for name in learnt:
        if name in kept:
            raise UsageError(f"'{name}' is given to --learn and to --keep; a data set is for one of them, rename one")
    return learnt, kept


def contents(sets: Mapping[str, Sequence[Records]]) -> dict[str, list[str]]:
    """What lies where the sources of each data set point, to tell it from other data."""
    from nexus_core.pipeline.keys import data_identity

    return {name: [data_identity(source.path, source.revision) for source in sources] for name, sources in sets.items()}
