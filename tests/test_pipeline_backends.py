"""What computed a stage is recorded with it: nothing that another stage of the same process used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_pipeline
import pytest

from nexus_core.hookspecs import hookimpl
from nexus_core.pipeline.plan import plan_recipe
from nexus_core.pipeline.run import execute
from nexus_core.pipeline.store import read_record
from nexus_core.stages.stage import Metrics, Stage, StageContext


def test_a_stage_without_a_model_has_only_what_it_was_the_first_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, str] = {}
    tell = hookimpl(lambda self: dict(used))
    monkeypatch.setattr(fake_pipeline.FakeFamily, "nexus_backends", tell, raising=False)

    def uses(**backends: str) -> Callable[[StageContext], Metrics]:
        def run(context: StageContext) -> Metrics:
            used.update(backends)
            return {}

        return run

    stages = (
        Stage("gather", 1, (), lambda recipe: {}, uses(experts="loop"), runs_model=True),
        Stage("select", 1, ("gather",), lambda recipe: {}, uses()),
        Stage("convert", 1, ("select",), lambda recipe: {}, uses(decode="table")),
        Stage("train", 1, ("convert",), lambda recipe: {}, uses(experts="loop"), runs_model=True),
    )
    plan = plan_recipe(fake_pipeline.recipe(tmp_path), checkpoint=fake_pipeline.checkpoint(tmp_path), stages=stages)
    records = {outcome.name: read_record(outcome.path) for outcome in execute(plan).outcomes}

    assert {name: dict(record.backends) for name, record in records.items() if record} == {
        "gather": {"experts": "loop"},
        "select": {},
        "convert": {"decode": "table"},
        "train": {"experts": "loop", "decode": "table"},
    }
