"""A pipeline of three quick stages over a checkpoint of one tensor: what runs is real, what it computes is not.

As a script it runs that pipeline, `python fake_pipeline.py FOLDER [GATE]`, and waits half-way for a file GATE, so that
tests can kill it there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.checkpoint.writer import atomic_file
from nexus_core.hookspecs import hookimpl
from nexus_core.pipeline.plan import Plan, plan_recipe
from nexus_core.pipeline.run import RunResult, execute
from nexus_core.plugins import Family, Plugins
from nexus_core.recipe.load import recipe_from
from nexus_core.recipe.schema import Recipe
from nexus_core.stages.stage import Stage, StageContext

STEPS = 20


class FakeFamily:
    @hookimpl
    def nexus_claims(self, config: Mapping[str, Any]) -> bool:
        return config["model_type"] == "fake"


def checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint of one small tensor, written if it is not there."""
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"model_type": "fake"}))
        save_file({"weight": torch.arange(4.0)}, model / "model.safetensors")
    plugins = Plugins()
    plugins.register(FakeFamily(), "fake", "test")
    return Checkpoint(str(model), model, {"model_type": "fake"}, Family("fake", plugins))


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe over one text file; changes: dotted keys with `__` for the dot, e.g. `train__max_steps=5`."""
    text = folder / "domain.txt"
    if not text.exists():
        text.write_text("one\n\ntwo\n")
    settings = {
        "schema": 1,
        "model": {"path": str(folder / "model")},
        "data": {"domain": [{"path": str(text)}]},
        "run": {"store": str(folder / "runs"), "device": "cpu", "tracking": {"enabled": False}},
    }
    return recipe_from(settings, name="fake", overrides=[f"{k.replace('__', '.')}={v}" for k, v in changes.items()])


def stages(
    during_train: Callable[[int], None] = lambda step: None, seen: list[str] | None = None, versions: int = 1
) -> tuple[Stage, ...]:
    """gather -> convert -> train, of which train goes on from where it was killed. seen: stages that ran."""
    seen = [] if seen is None else seen

    def gather(context: StageContext) -> dict[str, Any]:
        seen.append("gather")
        assert list(context.out.iterdir()) == []
        text = Path(context.recipe.data["domain"][0].path).read_text()
        (context.out / "words.json").write_text(json.dumps(text.split()))
        return {"words": len(text.split())}

    def convert(context: StageContext) -> dict[str, Any]:
        seen.append("convert")
        words = json.loads((context.inputs["gather"] / "words.json").read_text())
        (context.out / "start.json").write_text(json.dumps(len(words)))
        return {"start": len(words)}

    def train(context: StageContext) -> dict[str, Any]:
        seen.append("train")
        value = json.loads((context.inputs["convert"] / "start.json").read_text())
        state = context.out / "state.json"
        step, value = json.loads(state.read_text()) if state.exists() else (0, value)
        while step < STEPS:
            during_train(step)
            step, value = step + 1, (value * 31 + step) % 1009
            context.report(step, {"loss": float(value)})
            with atomic_file(state) as file:
                file.write(json.dumps([step, value]).encode())
        return {"value": value}

    return (
        Stage("gather", versions, (), lambda r: {"data": r.model_dump(mode="json")["data"]}, gather),
        Stage("convert", versions, ("gather",), lambda r: r.convert.model_dump(mode="json"), convert),
        Stage(
            "train",
            versions,
            ("convert",),
            lambda r: {"max_steps": r.train.max_steps, "seed": r.train.seed},
            train,
            resumes=True,
        ),
    )


def plan(folder: Path, *, until: str | None = None, changes: Mapping[str, Any] | None = None, **of_stages: Any) -> Plan:
    return plan_recipe(
        recipe(folder, **(changes or {})), until=until, checkpoint=checkpoint(folder), stages=stages(**of_stages)
    )


def run(
    folder: Path, *, until: str | None = None, rerun: tuple[str, ...] = (), changes: Any = None, **of_stages: Any
) -> RunResult:
    return execute(plan(folder, until=until, changes=changes, **of_stages), rerun=rerun)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder by relative path, without what differs between two equal runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != "stage.json"
    }


def wait_half_way(step: int, gate: Path | None) -> None:
    """Train no further than half of the steps before there is a file `gate`."""
    while gate is not None and step == STEPS // 2 and not gate.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    given = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    done = run(Path(sys.argv[1]), during_train=lambda step: wait_half_way(step, given))
    print(json.dumps({outcome.name: outcome.reused for outcome in done.outcomes}))
