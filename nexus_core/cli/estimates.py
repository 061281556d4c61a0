"""A recipe's estimate as a person reads it, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nexus_core.estimate import StageEstimate
    from nexus_core.pipeline.plan import Plan
    from nexus_core.pipeline.preflight import Preflight

HEADINGS = ("stage", "", "tokens", "memory", "new disk", "operations", "moved", "time")


def stage_table(plan: Plan, ahead: Preflight) -> list[str]:
    """One line a stage, then where each one's output lies."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for step in plan.steps:
        stage = ahead.stages.get(step.stage.name)
        state = "reused" if step.found else "runs"
        rows.append((step.stage.name, state, *(_figures(stage, ahead) if stage else ("",) * 6)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    widths[:2] = [9, 7]
    return [
        "  ".join(
            _cell(text, width, column) for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < 2 else text.rjust(width)


def _figures(stage: StageEstimate, ahead: Preflight) -> tuple[str, ...]:
    from nexus_core.pipeline.preflight import size

    work, memory = stage.work, stage.memory
    on_device = memory.device_bytes or memory.host_bytes
    return (
        f"{work.tokens:,}" if work.tokens else "",
        size(on_device),
        size(stage.disk_bytes) if stage.disk_bytes else "",
        operations(work.flops) if work.flops else "",
        size(work.moved_bytes) if work.moved_bytes else "",
        duration(work.seconds) if work.seconds else "seconds",
    )


def memory_table(ahead: Preflight, names: Iterable[str]) -> list[str]:
    """Memory of some stages by part, side by side, largest parts first."""
    from nexus_core.pipeline.preflight import size

    stages = {name: ahead.stages[name] for name in names if name in ahead.stages}
    columns = {name: stage.memory.parts or stage.memory.host for name, stage in stages.items()}
    parts = sorted(
        {part for column in columns.values() for part in column},
        key=lambda part: -max(column.get(part, 0) for column in columns.values()),
    )
    lines = [f"{'memory by part':<28}" + "".join(f"{name:>12}" for name in columns)]
    lines += [_line(part, [column.get(part, 0) for column in columns.values()]) for part in parts]
    lines.append(_line("together", [sum(column.values()) for column in columns.values()]))
    beside = {name: stage.memory.host_bytes for name, stage in stages.items() if stage.memory.parts}
    if beside:
        lines.append(_line("and in the machine's memory", [beside.get(name, 0) for name in columns]))
    lines.append(f"{'there is':<28}{size(ahead.device.available_bytes):>12} on {device_line(ahead)}")
    return lines


def _line(name: str, sizes: Iterable[int]) -> str:
    from nexus_core.pipeline.preflight import size

    return f"  {name:<26}" + "".join(f"{size(count) if count else '':>12}" for count in sizes)


def device_line(ahead: Preflight) -> str:
    """The device, what it is taken to do, and where that is known from."""
    device = ahead.device
    source = "measured just now" if device.measured else "expected of it"
    return (
        f"{device.name} ({device.memory_bytes / 1e9:,.1f} GB; {operations(device.flops)}/s and "
        f"{device.bandwidth / 1e9:,.0f} GB/s {source})"
    )


def stages_as_json(plan: Plan, ahead: Preflight) -> Mapping[str, Any]:
    """Every stage of the plan with its estimate."""
    found: dict[str, Any] = {}
    for step in plan.steps:
        found[step.stage.name] = {"key": step.key, "path": step.path, "reused": step.found is not None, "tokens": None}
        stage = ahead.stages.get(step.stage.name)
        if stage:
            found[step.stage.name] |= {
                "tokens": stage.work.tokens or None,
                "memory_bytes": dict(stage.memory.parts),
                "host_bytes": dict(stage.memory.host),
                "disk_bytes": stage.disk_bytes,
                "flops": stage.work.flops,
                "moved_bytes": stage.work.moved_bytes,
                "seconds": stage.work.seconds,
                "tokens_per_second": stage.work.tokens_per_second,
            }
    return found


def warnings(ahead: Preflight) -> list[str]:
    """What does not fit and what to change, in yellow."""
    return [click.style(f"warning: {ahead.sentence(misfit)}", fg="yellow") for misfit in ahead.misfits]


def operations(count: float) -> str:
    """Floating-point operations in the unit people say them in."""
    for unit, factor in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MFLOP"


def duration(seconds: float) -> str:
    """About how long, in one unit."""
    for unit, factor, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < factor * most:
            return f"{seconds / factor:,.{0 if seconds >= 10 * factor else 1}f} {unit}"
    return f"{seconds / 86400:,.1f} days"
