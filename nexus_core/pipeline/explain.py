"""Why each stage of a plan is reused or has to run: what differs from the nearest output that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_core.pipeline.keys import Ingredients
from nexus_core.pipeline.plan import Plan, Step
from nexus_core.pipeline.store import StageRecord, Store

NOTHING = "not set"


@dataclass(frozen=True)
class Explanation:
    """One stage: whether its output is there, and if not, why not.

    reasons: one line each; empty if reused. compared_with: the nearest earlier output, None if there is none.
    """

    stage: str
    key: str
    path: Path
    reused: bool
    reasons: tuple[str, ...]
    compared_with: Path | None = None


def explain(plan: Plan) -> list[Explanation]:
    """An explanation per stage of the plan, in order."""
    return [_explain_step(step, plan.store) for step in plan.steps]


def _explain_step(step: Step, store: Store) -> Explanation:
    name = step.stage.name
    if step.found:
        return Explanation(name, step.key, step.path, True, ())
    earlier = store.records(name)
    if not earlier:
        reason = f"there is no earlier output of {name} in {store.root}"
        return Explanation(name, step.key, step.path, False, (reason,))
    # Newest first, and min keeps the first of equals.
    nearest = min(earlier, key=lambda record: len(differences(record, step.ingredients)))
    reasons = tuple(differences(nearest, step.ingredients))
    return Explanation(name, step.key, step.path, False, reasons, store.place(name, nearest.key))


def differences(before: StageRecord, now: Ingredients) -> list[str]:
    """What changed from an earlier output to what is wanted now, one line each, in words."""
    found = []
    if before.version != now.version:
        found.append(f"the code of {now.stage} changed: version {before.version} -> {now.version}")
    if before.model.get("fingerprint") != now.model.get("fingerprint"):
        found.append(
            "the model's content changed: fingerprint "
            f"{before.model.get('fingerprint', NOTHING)[:12]} -> {now.model.get('fingerprint', NOTHING)[:12]}"
        )
    if before.model.get("dtype") != now.model.get("dtype"):
        found.append(f"model.dtype: {before.model.get('dtype')} -> {now.model.get('dtype')}")
    for stage in sorted({*before.inputs, *now.inputs}):
        old, new = before.inputs.get(stage), now.inputs.get(stage)
        if old != new:
            found.append(f"its input {stage} is another: {old} -> {new}")
    return found + _setting_differences(before, now)


def _setting_differences(before: StageRecord, now: Ingredients) -> list[str]:
    old, new = flat(before.settings), flat(now.settings)
    found = []
    for name in sorted({*old, *new}):
        was, wanted = old.get(name, NOTHING), new.get(name, NOTHING)
        if name.endswith("path") and was in before.data and wanted in now.data:
            # Only content counts: a file that moved is the same, one that changed in place is not.
            if before.data[was] != now.data[wanted]:
                place = f"{was} -> {wanted}" if was != wanted else f"the content of {wanted} changed"
                found.append(f"{name}: {place}")
        elif was != wanted:
            found.append(f"{name}: {was} -> {wanted}")
    return found


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b[0].c` to value."""
    if isinstance(settings, Mapping) and settings:
        children = [(f"{prefix}.{name}" if prefix else str(name), value) for name, value in settings.items()]
    elif isinstance(settings, list) and settings:
        children = [(f"{prefix}[{position}]", value) for position, value in enumerate(settings)]
    else:
        return {prefix: settings}
    return {name: leaf for child, value in children for name, leaf in flat(value, child).items()}
