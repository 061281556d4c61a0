"""The stages in the order they run, and which of them a request touches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

from nexus_core.errors import UsageError, suggestion
from nexus_core.stages.stage import Stage

# A new stage is one module in nexus_core/stages with a STAGE, and its name here, after the stages it reads.
NAMES = ("generate", "collect", "select", "convert", "capture", "train", "validate")


def all_stages() -> tuple[Stage, ...]:
    """Every stage of the pipeline, each after the stages it reads."""
    return tuple(import_module(f"nexus_core.stages.{name}").STAGE for name in NAMES)


def up_to(stages: Sequence[Stage], until: str | None) -> tuple[Stage, ...]:
    """The stages that `until` needs, and itself, in order; all of them for None. Raises UsageError if unknown."""
    if until is None:
        return tuple(stages)
    by_name = {stage.name: stage for stage in stages}
    needed = {_known(until, by_name, "--until")}
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.inputs)
    return tuple(stage for stage in stages if stage.name in needed)


def from_there_on(stages: Sequence[Stage], names: Iterable[str]) -> frozenset[str]:
    """The named stages and every stage that reads them, directly or not. Raises UsageError if one is unknown."""
    by_name = {stage.name: stage for stage in stages}
    touched = {_known(name, by_name, "--rerun") for name in names}
    for stage in stages:
        if touched.intersection(stage.inputs):
            touched.add(stage.name)
    return frozenset(touched)


def _known(name: str, stages: Iterable[str], flag: str) -> str:
    known = list(stages)
    if name in known:
        return name
    raise UsageError(f"{flag} {name}: this run has no stage of that name{suggestion(name, known)}")
