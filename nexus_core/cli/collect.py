"""`nexus collect`: what a model's routers do with your data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nexus_core.cli.output import failure_as_json, json_option, print_json

# The data set that files given without a name belong to.
DEFAULT_SET = "data"


@click.command("collect")
@click.argument("model")
@click.option(
    "--data",
    metavar="[NAME=]FILE",
    multiple=True,
    required=True,
    help="Text to route, whole; may be given again. Names have equal shares of the tokens.",
)
@click.option("--tokens", type=int, help="Tokens to route.  [default: 1000000]")
@click.option("--sequence-length", type=int, help="Tokens per sequence.  [default: 512]")
@click.option("--batch-size", type=int, help="Sequences per forward pass.  [default: 8]")
@click.option("--sampling", help="How records are drawn: coverage (the default) or uniform.")
@click.option(
    "--keep-probabilities",
    metavar="all|N",
    help="Also write the router probabilities of all tokens, or of the first N, as NPZ.",
)
@click.option("--seed", type=int, help="Seed of the draw.")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Any key of a recipe's collect section, e.g. sampling.candidates=50000 or data.NAME=0.75.",
)
@click.option("--dtype", default="auto", help="Type of the computation: auto, float32 or bfloat16.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto is a GPU if there is one.")
@click.option("--revision", help="Commit, branch or tag of a Hub id.")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@json_option
def command(
    model: str,
    data: tuple[str, ...],
    tokens: int | None,
    sequence_length: int | None,
    batch_size: int | None,
    sampling: str | None,
    keep_probabilities: str | None,
    seed: int | None,
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    revision: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Gather the router statistics of MODEL over your data.

    Writes router_stats.safetensors, a few megabytes however many tokens there are, a few inputs of each layer for the
    report of `nexus convert`, and how the text was drawn. Of a converted model it is the base in it that is asked.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.cli.train import named_sources
        from nexus_core.models import choose_device, compute_dtype
        from nexus_core.pipeline.store import atomic_folder
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Collect
        from nexus_core.stages.collect import collect

        sets = named_sources(tuple(item if "=" in item else f"{DEFAULT_SET}={item}" for item in data), "--data")
        values = {
            "data": dict.fromkeys(sets, 1.0),
            "tokens": tokens,
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "sampling": {"strategy": sampling} if sampling else None,
            "keep_probabilities": _number_or_all(keep_probabilities),
            "seed": seed,
        }
        settings = section_from(Collect, values, assignments)
        place = choose_device(device)
        checkpoint = open_checkpoint(model, revision)
        with atomic_folder(out) as folder:
            metrics = collect(
                checkpoint, sets, settings, folder, device=place, dtype=compute_dtype(dtype, place), part="all"
            )
    if as_json:
        print_json({"status": "done", "path": out, "metrics": metrics})
    else:
        click.echo("\n".join(_as_text(out, metrics)))


def _number_or_all(text: str | None) -> bool | int | str | None:
    if text == "all":
        return True
    return int(text) if text and text.isdecimal() else text


def _as_text(out: Path, metrics: Mapping[str, Any]) -> list[str]:
    from nexus_core.stages.collect import REPORT_NAME

    report = json.loads((out / REPORT_NAME).read_text())
    lines = []
    for name, entry in report["sets"].items():
        chosen, random = entry["sampling"]["chosen"], entry["sampling"]["random"]
        lines.append(
            f"{name:<11} {entry['tokens']:,} tokens of {chosen['documents']:,} documents; they use "
            f"{chosen['vocabulary_coverage']:.1%} of the candidates' vocabulary (a random draw: "
            f"{random['vocabulary_coverage']:.1%})"
        )
    lines += [
        f"routers     entropy {metrics['router_entropy_nats']:.2f} nats, "
        f"{metrics['router_entropy_share_of_even']:.0%} of an even spread; {metrics['experts_never_chosen']} experts "
        "never chosen",
        "",
        f"statistics  {out}",
        f"next        nexus select {out} --out DIR",
    ]
    return lines
