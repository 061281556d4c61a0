"""`nexus select`: which experts each layer's shared expert is built from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_core.cli.output import failure_as_json, json_option, print_json

if TYPE_CHECKING:
    from nexus_core.select import Selection

SHOWN_EXPERTS = 8


@click.command("select")
@click.argument("statistics", metavar="STATS", type=click.Path(path_type=Path))
@click.option(
    "--strategy", help="How a layer's experts are ranked, e.g. pca (the default), frequency, gate_mass, random."
)
@click.option("--top-k", metavar="N|auto", help="Experts per layer; auto goes by what the top 4 hold.  [default: auto]")
@click.option("--seed", type=int, help="Seed of strategies that draw.")
@click.option(
    "--set", "parameters", metavar="KEY=VALUE", multiple=True, help="A parameter of the strategy, e.g. components=20."
)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@json_option
def command(
    statistics: Path,
    strategy: str | None,
    top_k: str | None,
    seed: int | None,
    parameters: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Rank each layer's experts by the router statistics STATS and choose the most important.

    STATS is the folder that `nexus collect` wrote, or the router_stats.safetensors in it. Writes selection.json and
    plots of how importance is distributed.
    """
    with failure_as_json(as_json):
        from nexus_core.pipeline.store import atomic_folder
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Select
        from nexus_core.select import read_selection
        from nexus_core.stages.select import select

        values = {"strategy": strategy, "top_k": _number(top_k), "seed": seed}
        settings = section_from(Select, values, parameters)
        with atomic_folder(out) as folder:
            metrics = select(statistics, settings, folder)
    if as_json:
        print_json({"status": "done", "path": out, "metrics": metrics})
    else:
        click.echo("\n".join(_as_text(read_selection(out), out)))


def _number(text: str | None) -> str | int | None:
    return int(text) if text and text.lstrip("-").isdecimal() else text


def _as_text(selection: Selection, out: Path) -> list[str]:
    lines = ["layer  pattern   top 4  experts, most important first"]
    for layer in selection.layers:
        experts = ", ".join(str(expert) for expert in layer.experts[:SHOWN_EXPERTS])
        more = len(layer.experts) - SHOWN_EXPERTS
        lines.append(
            f"{layer.layer:>5}  {layer.pattern:<8}  {layer.top_share['4']:>5.1%}  {experts}"
            + (f" and {more} more" if more > 0 else "")
        )
    return [
        *lines,
        "",
        f"selection  {out / 'selection.json'}",
        f"next       nexus convert MODEL --selection {out} --out DIR",
    ]
