"""Recorded runs side by side: columns are runs, rows are settings that differ and what came of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_core.types import RecordedRun

ABSENT = "-"

# Settings of how a run was executed change nothing about what came of it.
EXECUTION = "run."

# Measured while training, but a matter of the router's health.
ROUTER_WHILE_TRAINING = "train/router_"

MAX_CELL_CHARACTERS = 44
GAP = "  "


@dataclass(frozen=True)
class Row:
    """A label and one cell per run."""

    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Rows under a title; an empty title heads the table."""

    title: str
    rows: tuple[Row, ...]


def differing_settings(runs: Sequence[RecordedRun]) -> dict[str, tuple[str | None, ...]]:
    """Settings that are not the same in all runs, by name: one value per run, None where it is not set."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(EXECUTION)})
    values = {name: tuple(run.settings.get(name) for run in runs) for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def compare(runs: Sequence[RecordedRun]) -> list[Section]:
    """The comparison as sections of text cells; sections and rows that no run has anything for are left out."""
    heading = [
        Row("run", tuple(run.run_id[:8] for run in runs)),
        Row("started", tuple(f"{run.started.astimezone():%Y-%m-%d %H:%M}" for run in runs)),
        *(
            [Row("status", tuple(run.status.lower() for run in runs))]
            if _any(runs, lambda run: run.status != "FINISHED")
            else []
        ),
        *(
            [Row("verdict", tuple(run.verdict or ABSENT for run in runs))]
            if _any(runs, lambda run: run.verdict)
            else []
        ),
    ]
    sets = _names(runs, "change/")
    sections = [
        Section("", tuple(heading)),
        Section("settings that differ", tuple(_setting_rows(runs))),
        Section("gain: perplexity on learnt sets, base -> student", tuple(_set_rows(runs, sets, learnt=True))),
        Section("retention: perplexity on all other sets", tuple(_set_rows(runs, sets, learnt=False))),
        Section("router health", _router_rows(runs)),
        Section("training, final", tuple(_training_rows(runs))),
        Section("seconds", tuple(_second_rows(runs))),
    ]
    return [section for section in sections if section.rows]


def as_text(runs: Sequence[RecordedRun], width: int) -> str:
    """The comparison as a table at most `width` characters wide; runs that do not fit follow in a second block."""
    sections = compare(runs)
    rows = [row for section in sections for row in section.rows]
    label_width = max(2 + len(row.label) for row in rows)
    titles = [_cut(run.name) for run in runs]
    column_widths = [max(len(titles[column]), *(len(row.cells[column]) for row in rows)) for column in range(len(runs))]
    blocks = _blocks(column_widths, width - label_width)
    return "\n\n\n".join(
        "\n".join(_block_lines(sections, titles, label_width, column_widths, columns)) for columns in blocks
    )


def as_json(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """The comparison as plain data: numbers stay numbers, and each run's settings are there whole."""
    return {
        "runs": [
            {
                "run": run.run_id,
                "recipe": run.name,
                "status": run.status.lower(),
                "started": run.started.isoformat(timespec="seconds"),
                "verdict": run.verdict or None,
                "sets": {name: _set_numbers(run, name) for name in _names([run], "change/")},
                "router": _under(run.metrics, "router/"),
                "training": _under(run.metrics, "train/"),
                "seconds": {stage: run.metrics.get(f"seconds/{stage}") for stage in run.stages},
                "reused": list(run.reused),
                "settings": dict(run.settings),
            }
            for run in runs
        ],
        "settings_that_differ": {name: list(values) for name, values in differing_settings(runs).items()},
    }


def _setting_rows(runs: Sequence[RecordedRun]) -> Iterable[Row]:
    for name, values in differing_settings(runs).items():
        yield Row(name, tuple(ABSENT if value is None else _cut(value) for value in values))


def _set_rows(runs: Sequence[RecordedRun], names: Sequence[str], *, learnt: bool) -> Iterable[Row]:
    for name in names:
        cells = tuple(_set_cell(run, name) if (name in run.learnt) == learnt else ABSENT for run in runs)
        if any(cell != ABSENT for cell in cells):
            yield Row(name, cells)


def _set_cell(run: RecordedRun, name: str) -> str:
    base, student, change = _set_values(run, name)
    if base is None or student is None or change is None:
        return ABSENT
    return f"{_number(base)} -> {_number(student)} ({change:+.1%})"


def _set_numbers(run: RecordedRun, name: str) -> dict[str, Any]:
    role = "learnt" if name in run.learnt else "kept" if name in run.kept else "watched"
    base, student, change = _set_values(run, name)
    return {"role": role, "base": base, "student": student, "change": change}


def _set_values(run: RecordedRun, name: str) -> tuple[float | None, ...]:
    """Base, student and change; None where tracking has no number, as for a perplexity that is infinite."""
    return tuple(
        run.metrics.get(key) for key in (f"perplexity/{name}/base", f"perplexity/{name}/student", f"change/{name}")
    )


def _router_rows(runs: Sequence[RecordedRun]) -> tuple[Row, ...]:
    validated = (_metric_row(runs, f"router/{name}", name) for name in _names(runs, "router/"))
    trained = (
        _metric_row(runs, f"{ROUTER_WHILE_TRAINING}{name}", f"{name} while training")
        for name in _names(runs, ROUTER_WHILE_TRAINING)
    )
    return (*validated, *trained)


def _training_rows(runs: Sequence[RecordedRun]) -> Iterable[Row]:
    for name in _names(runs, "train/"):
        if not f"train/{name}".startswith(ROUTER_WHILE_TRAINING):
            yield _metric_row(runs, f"train/{name}", name)


def _metric_row(runs: Sequence[RecordedRun], metric: str, label: str) -> Row:
    values = [run.metrics.get(metric) for run in runs]
    cells = tuple(ABSENT if value is None else _number(value) for value in values)
    return Row(label.replace("/", " ").replace("_", " "), cells)


def _second_rows(runs: Sequence[RecordedRun]) -> Iterable[Row]:
    for stage in dict.fromkeys(stage for run in runs for stage in run.stages):
        cells = []
        for run in runs:
            seconds = run.metrics.get(f"seconds/{stage}")
            reused = " (reused)" if stage in run.reused else ""
            cells.append(ABSENT if seconds is None else f"{seconds:,.1f}{reused}")
        yield Row(stage, tuple(cells))


def _names(runs: Sequence[RecordedRun], prefix: str) -> list[str]:
    """What follows the prefix in the metrics' names, over all runs, sorted."""
    return sorted({name for run in runs for name in _under(run.metrics, prefix)})


def _under(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _number(value: float) -> str:
    """Four significant digits, thousands set apart."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_CELL_CHARACTERS else flat[: MAX_CELL_CHARACTERS - 1] + "…"


def _any(runs: Sequence[RecordedRun], claim: Callable[[RecordedRun], object]) -> bool:
    return any(claim(run) for run in runs)


def _blocks(column_widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns in groups that fit beside the labels, at least one each."""
    blocks: list[list[int]] = [[]]
    used = 0
    for column, column_width in enumerate(column_widths):
        needed = len(GAP) + column_width
        if blocks[-1] and used + needed > room:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += needed
    return blocks


def _block_lines(
    sections: Sequence[Section],
    titles: Sequence[str],
    label_width: int,
    column_widths: Sequence[int],
    columns: Sequence[int],
) -> Iterable[str]:
    def line(label: str, cells: Sequence[str]) -> str:
        shown = (f"{cells[column]:<{column_widths[column]}}" for column in columns)
        return GAP.join([f"{label:<{label_width}}", *shown]).rstrip()

    yield line("", titles)
    for section in sections:
        if section.title:
            yield ""
            yield section.title
        for row in section.rows:
            yield line(f"  {row.label}" if section.title else row.label, row.cells)
