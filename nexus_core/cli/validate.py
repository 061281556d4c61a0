"""`nexus validate`: a model beside its own base on your own files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nexus_core.cli.folders import of_the_first
from nexus_core.cli.launch import in_processes
from nexus_core.cli.options import device_option, dtype_option, json_option, out_option, section_option
from nexus_core.cli.output import failure_as_json, print_done
from nexus_core.cli.sources import named_sources

# More sequences than any file has: the whole of it.
WHOLE_FILE = sys.maxsize


@click.command("validate")
@click.argument("model")
@click.option(
    "--data", metavar="NAME=FILE", multiple=True, required=True, help="Text to measure on, whole; may be given again."
)
@click.option(
    "--learnt", metavar="NAME", multiple=True, help="A set that was to be learnt; the others were to be kept."
)
@click.option("--samples", type=int, help="Measure on no more than so many sequences of each set.")
@section_option("validate section, e.g. sequence_length=1024")
@dtype_option
@device_option
@out_option
@json_option
@in_processes
def command(
    model: str,
    data: tuple[str, ...],
    learnt: tuple[str, ...],
    samples: int | None,
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Measure perplexity and router health of MODEL, converted or trained, beside those of its own base.

    An untouched base is its own base: the two columns are the same. DIR gets report.json and a picture.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.errors import UsageError, suggestion
        from nexus_core.models import choose_device
        from nexus_core.pipeline.store import atomic_folder
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Validate
        from nexus_core.stages.validate import validate

        sets = named_sources(data, "--data")
        for name in learnt:
            if name not in sets:
                raise UsageError(f"--learnt {name}: there is no --data of that name{suggestion(name, sets)}")
        settings = section_from(Validate, {"samples": WHOLE_FILE if samples is None else samples}, assignments)
        checkpoint = open_checkpoint(model)
        place = choose_device(device)
        with of_the_first(atomic_folder(out)) as folder:
            metrics = validate(checkpoint, sets, settings, learnt, folder, part="all", dtype=dtype, device=place)
    print_done(as_json, {"path": out, "metrics": metrics}, lambda: _as_text(out, metrics, list(sets)))


def _as_text(out: Path, metrics: Mapping[str, Any], names: list[str]) -> list[str]:
    width = max(len(name) for name in [*names, "perplexity"])
    lines = [f"{'perplexity':<{width}}  {'base':>10}  {'student':>10}  change"]
    for name in names:
        base, student = metrics[f"perplexity/{name}/base"], metrics[f"perplexity/{name}/student"]
        lines.append(f"{name:<{width}}  {base:>10.4g}  {student:>10.4g}  {metrics[f'change/{name}']:+.2%}")
    return [
        *lines,
        "",
        f"router      entropy {metrics['router/entropy']:.3g}, base {metrics['router/entropy_base']:.3g}; L1 distance "
        f"{metrics['router/l1']:.3g}",
        f"verdict     {metrics['verdict']}",
        f"report      {out / 'report.json'}",
    ]
