"""`nexus select`: which experts each layer's shared expert is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.options import json_option, out_option
from nexus_core.cli.output import failure_as_json, print_done
from nexus_core.errors import UsageError, suggestion

if TYPE_CHECKING:
    from nexus_core.recipe.schema import Select
    from nexus_core.select import Selection

SHOWN_EXPERTS = 8

# Where every pair of strategies does not fit into so many characters, only their means are told.
TABLE_WIDTH = 110


@click.command("select")
@click.argument("statistics", metavar="STATS", type=click.Path(path_type=Path))
@click.option("--strategy", help="How a layer's experts are ranked, e.g. pca (the default), saliency or diverse.")
@click.option("--compare", metavar="A,B,...", help="Choose by several strategies and tell how far they agree.")
@click.option(
    "--top-k",
    metavar="N|N,N,...|auto|cumulative=P",
    help="Experts per layer: one number, one for each layer, by what the top 4 hold (the default), or as few as hold "
    "the share P of the importance.",
)
@click.option("--seed", type=int, help="Seed of strategies that draw.")
@click.option(
    "--set",
    "parameters",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of the strategy, e.g. components=20; of several, of those that have it.",
)
@out_option
@json_option
def command(
    statistics: Path,
    strategy: str | None,
    compare: str | None,
    top_k: str | None,
    seed: int | None,
    parameters: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Rank each layer's experts by the router statistics STATS and choose the first of them.

    STATS is the folder that `nexus collect` wrote, or the router_stats.safetensors in it. Writes selection.json and
    plots of how importance is distributed. With --compare: one folder per strategy, comparison.json, and plots of what
    they agree on.
    """
    with failure_as_json(as_json):
        from nexus_core.pipeline.store import atomic_folder
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Select
        from nexus_core.select import read_selection
        from nexus_core.stages import select as stage

        values = {"strategy": strategy, "top_k": _top_k(top_k), "seed": seed}
        if compare is not None:
            settings = _of_each(compare, values, parameters)
            with atomic_folder(out) as folder:
                comparison = stage.compare(statistics, settings, folder)
            answer, lines = {"path": out, **comparison}, _comparison_as_text(comparison, out)
        else:
            chosen = section_from(Select, values, parameters)
            with atomic_folder(out) as folder:
                metrics = stage.select(statistics, chosen, folder)
            answer, lines = {"path": out, "metrics": metrics}, _as_text(read_selection(out), out)
    print_done(as_json, answer, lambda: lines)


def _top_k(text: str | None) -> Any:
    """A flag's text as a recipe would have it; what is none of the four stays text, for the schema to refuse."""
    if text is None:
        return None
    name, equals, share = text.partition("=")
    if name == "cumulative" and equals:
        try:
            return {"cumulative": float(share)}
        except ValueError:
            return {"cumulative": share}
    numbers = [int(part) if part.strip().lstrip("-").isdecimal() else part for part in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def _of_each(names: str, values: Mapping[str, Any], parameters: tuple[str, ...]) -> dict[str, Select]:
    """The settings of each strategy to compare. Raises UsageError if there are not two, or nobody has a parameter."""
    from nexus_core.plugins import installed
    from nexus_core.recipe.load import section_from
    from nexus_core.recipe.schema import Select

    if values["strategy"] is not None:
        raise UsageError("--strategy chooses by one strategy and --compare by several; give one of the two")
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if len(chosen) < 2:
        raise UsageError(f"--compare {names}: names no two strategies; write e.g. --compare pca,frequency")
    known = installed().strategies("selection")
    fields = {
        name: set(model.model_fields) if name in known and (model := known[name].parameters) else set()
        for name in chosen
    }
    for parameter in parameters:
        key = parameter.partition("=")[0].strip()
        if not any(key in own for own in fields.values()):
            own = set().union(*fields.values())
            raise UsageError(
                f"--set {parameter}: none of {', '.join(chosen)} has a parameter '{key}'{suggestion(key, own)}"
            )
    return {
        name: section_from(
            Select,
            {**values, "strategy": name},
            [parameter for parameter in parameters if parameter.partition("=")[0].strip() in fields[name]],
        )
        for name in chosen
    }


def _comparison_as_text(comparison: Mapping[str, Any], out: Path) -> list[str]:
    """The share of experts that both choose: of few strategies by layer, of many the mean alone."""
    pairs = comparison["overlap"]
    names = list(comparison["strategies"])
    labels = ["-".join(pair["strategies"]) for pair in pairs]
    if sum(map(len, labels)) + 2 * len(labels) < TABLE_WIDTH:
        by_layer = zip(comparison["layers"], *(pair["by_layer"] for pair in pairs), strict=True)
        rows = [["layer", *labels]]
        rows += [[str(layer), *map(_percent, shares)] for layer, *shares in by_layer]
        rows.append(["mean", *(_percent(pair["mean"]) for pair in pairs)])
    else:
        means = {frozenset(pair["strategies"]): pair["mean"] for pair in pairs}
        rows = [["", *names]]
        rows += [[one, *(_percent(means.get(frozenset((one, other)), 1.0)) for other in names)] for one in names]
    stand_for = [["", "experts", "tokens", "variance"]]
    for name, each in comparison["strategies"].items():
        metrics = each["metrics"]
        share_of = [_percent(metrics["routed_share_mean"]), _percent(metrics["explained_share_mean"])]
        stand_for.append([name, f"{metrics['experts_chosen_per_layer']:.3g}", *share_of])
    return [
        "experts that both choose, of all that either does (Jaccard index)",
        "",
        *_table(rows),
        "",
        "experts per layer, tokens routed to them, and variance of routing that their probabilities explain",
        "",
        *_table(stand_for),
        "",
        f"comparison  {out / 'comparison.json'}, by layer",
        f"next        nexus convert MODEL --selection {out / names[0]} --out DIR",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _percent(share: float) -> str:
    return f"{share:.1%}"


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
