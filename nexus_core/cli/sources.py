"""Data sets as commands take them: `NAME=FILE`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_core.recipe.schema import Source


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
