"""`nexus convert`: one shared expert per layer, built from the model's own experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_core.cli.options import json_option, out_option, revision_option
from nexus_core.cli.output import failure_as_json, print_done

if TYPE_CHECKING:
    from nexus_core.select import Selection


@click.command("convert")
@click.argument("model")
@click.option(
    "--selection",
    "selection_file",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="selection.json of `nexus select`, or its folder.",
)
@click.option(
    "--merge", help="How experts become one: mean (the default), weighted, aligned, neurons, top1, random, a plugin's."
)
@click.option("--start", metavar="zero|full|FACTOR", help="First output of the shared expert.  [default: zero]")
@click.option("--width", type=int, help="Neurons of the shared expert, any number; one routed expert's if left out.")
@click.option("--seed", type=int, help="Seed of strategies that draw.")
@click.option("--set", "parameters", metavar="KEY=VALUE", multiple=True, help="A parameter of the merge strategy.")
@click.option(
    "--statistics",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of `nexus collect`, for the report on output change and for merges that need it; by default the one "
    "the selection was made from.",
)
@click.option(
    "--learn",
    metavar="NAME",
    multiple=True,
    help="For merge neurons: a data set of the statistics that is to be learnt; the others are kept. May be repeated.",
)
@revision_option
@out_option
@json_option
def command(
    model: str,
    selection_file: Path,
    merge: str | None,
    start: str | None,
    width: int | None,
    seed: int | None,
    parameters: tuple[str, ...],
    statistics: Path | None,
    learn: tuple[str, ...],
    revision: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Give MODEL one shared expert per layer, merged from the selected experts.

    The model is never loaded: memory stays at a few experts. The base's weights are linked, or copied onto another
    file system, byte for byte. DIR can then be trained, validated, talked to and loaded like any model.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.pipeline.store import atomic_folder
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Convert
        from nexus_core.select import read_selection
        from nexus_core.stages.convert import MOE_INPUTS_NAME, SALIENCY_NAME, convert

        values = {"merge": merge, "start": _factor(start), "width": width, "seed": seed}
        settings = section_from(Convert, values, parameters)
        checkpoint = open_checkpoint(model, revision)
        _refuse_inside(out, checkpoint.folder)
        selection = read_selection(selection_file)
        collected = find_statistics(statistics, selection, selection_file)
        with atomic_folder(out) as folder:
            metrics = convert(
                checkpoint,
                selection,
                settings,
                folder,
                moe_inputs=collected.get(MOE_INPUTS_NAME),
                neuron_saliency=collected.get(SALIENCY_NAME),
                learn=learn or None,
                selection_file=str(selection_file),
            )
    print_done(as_json, {"path": out, "metrics": metrics}, lambda: _as_text(out, metrics))


def find_statistics(statistics: Path | None, selection: Selection, selection_file: Path) -> dict[str, Path]:
    """What collect kept for convert, by file name: in the named folder, else in the one the selection was made from.

    Raises UsageError if the named folder has none of it.
    """
    from nexus_core.errors import UsageError
    from nexus_core.stages.convert import MOE_INPUTS_NAME, SALIENCY_NAME

    folder = statistics
    if folder is None:
        if selection.statistics is None:
            return {}
        beside = selection_file if selection_file.is_dir() else selection_file.parent
        folder = beside.resolve() / selection.statistics
    found = {name: folder / name for name in (MOE_INPUTS_NAME, SALIENCY_NAME) if (folder / name).is_file()}
    if statistics is not None and not found:
        raise UsageError(
            f"--statistics {statistics}: holds neither {MOE_INPUTS_NAME} nor {SALIENCY_NAME}; name a folder that "
            "`nexus collect` wrote, or leave it out"
        )
    return found


def _factor(text: str | None) -> str | float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return text


def _refuse_inside(out: Path, model: Path) -> None:
    from nexus_core.errors import UsageError

    place = out.expanduser().resolve()
    if place == model.resolve() or model.resolve() in place.parents:
        raise UsageError(f"--out {out}: lies in the model's own folder {model}; name a folder outside it")


def _as_text(out: Path, metrics: Mapping[str, float | int | str]) -> list[str]:
    import json

    from nexus_core.pipeline.preflight import size
    from nexus_core.stages.convert import REPORT_NAME

    report = json.loads((out / REPORT_NAME).read_text())
    added = (report["bytes_after"] - report["bytes_before"]) / report["bytes_before"]
    lines = [
        f"size        {size(report['bytes_before'])} before, {size(report['bytes_after'])} after (+{added:.1%}); "
        f"base weights by {report['base_shards']}",
        f"trainable   {report['trainable_parameters']:,} parameters: {len(report['layers'])} shared experts of width "
        f"{report['width']}",
    ]
    if "relative_output_change" in metrics:
        now, full = metrics["relative_output_change"], metrics["relative_output_change_at_full_start"]
        lines.append(
            f"start       {report['start']}: changes the layers' outputs by {now:.1%}; full would by {full:.1%}, "
            f"cosine {metrics['cosine_to_routed_output']:.2f} (means over layers)"
        )
    lines += [f"left out    {sentence}" for sentence in report["left_out"]]
    return [
        *lines,
        "",
        f"model       {out}",
        f"next        nexus train {out} --learn NAME=FILE --keep NAME=FILE --out DIR",
    ]
