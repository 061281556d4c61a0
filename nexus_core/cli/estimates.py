"""A recipe's estimate as a person reads it, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nexus_core.estimate import StageEstimate
    from nexus_core.pipeline.outline import Outline
    from nexus_core.pipeline.preflight import Preflight

HEADINGS = ("stage", "", "tokens", "memory", "new disk", "operations", "moved", "time")


def stage_table(outline: Outline, ahead: Preflight) -> list[str]:
    """One line a stage: what it takes."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for stage in outline.stages:
        estimate = ahead.stages.get(stage.name)
        state = "reused" if stage.is_reused else "runs"
        rows.append((stage.name, state, *(_figures(estimate, ahead) if estimate else ("",) * 6)))
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


def place_lines(outline: Outline) -> list[str]:
    """One line a stage: where its output lies or will lie."""
    return [
        f"{stage.name:<9} {'reused' if stage.is_reused else 'runs':<7} "
        f"{stage.step.path if stage.step else 'no reuse key without the weights'}"
        for stage in outline.stages
    ]


def weight_lines(ahead: Preflight) -> list[str]:
    """One line for each model whose weights are not here: how many bytes they are, and where they would come from."""
    from nexus_core.pipeline.preflight import size

    return [
        f"weights  of {weights.name} are not here: {size(weights.stored_bytes)}, "
        + (
            f"{size(weights.download_bytes)} of which `nexus run` downloads to {weights.folder}"
            if weights.is_downloaded
            else f"to be put into {weights.folder} before `nexus run`"
        )
        for weights in ahead.missing
    ]


def weights_as_json(ahead: Preflight) -> list[dict[str, Any]]:
    """Each model whose weights are not here."""
    return [
        {
            "path": weights.folder,
            "stored_bytes": weights.stored_bytes,
            "download_bytes": weights.download_bytes,
            "downloaded": weights.is_downloaded,
        }
        for weights in ahead.missing
    ]


def stages_as_json(outline: Outline, ahead: Preflight) -> Mapping[str, Any]:
    """Every stage of the recipe with its estimate; key and path null while weights are not here."""
    found: dict[str, Any] = {}
    for stage in outline.stages:
        step = stage.step
        found[stage.name] = {
            "key": step.key if step else None,
            "path": step.path if step else None,
            "reused": stage.is_reused,
            "tokens": None,
        }
        estimate = ahead.stages.get(stage.name)
        if estimate:
            found[stage.name] |= {
                "tokens": estimate.work.tokens or None,
                "memory_bytes": dict(estimate.memory.parts),
                "host_bytes": dict(estimate.memory.host),
                "disk_bytes": estimate.disk_bytes,
                "flops": estimate.work.flops,
                "moved_bytes": estimate.work.moved_bytes,
                "seconds": estimate.work.seconds,
                "tokens_per_second": estimate.work.tokens_per_second,
            }
    return found


def warnings(ahead: Preflight) -> list[str]:
    """What does not fit and what to change, and what was not counted, in yellow."""
    said = [ahead.sentence(misfit) for misfit in ahead.misfits] + list(ahead.notes)
    return [click.style(f"warning: {sentence}", fg="yellow") for sentence in said]


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
