"""`nexus collect`: what a model's routers do with your data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nexus_core.cli.folders import resumable_folder
from nexus_core.cli.launch import in_processes
from nexus_core.cli.options import device_option, dtype_option, json_option, out_option, revision_option, section_option
from nexus_core.cli.output import failure_as_json, print_done
from nexus_core.cli.sources import contents, named_sources

# The data set that files given without a name belong to.
DEFAULT_SET = "data"


@click.command("collect")
@click.argument("model", required=False)
@click.option(
    "--data",
    metavar="[NAME=]FILE",
    multiple=True,
    help="Text to route, whole; may be given again. Names have equal shares of the tokens.",
)
@click.option("--tokens", type=int, help="Tokens to route.  [default: 1000000]")
@click.option("--sequence-length", type=int, help="Tokens per sequence.  [default: 512]")
@click.option("--batch-size", type=int, help="Sequences per forward pass.  [default: 8]")
@click.option("--sampling", help="How records are drawn: coverage (the default), uniform or kl_greedy.")
@click.option(
    "--keep-probabilities",
    metavar="all|N",
    help="Also write the router probabilities of all tokens, or of the first N, as NPZ.",
)
@click.option(
    "--expert-norms",
    is_flag=True,
    default=None,
    help="Also gather what experts and neurons put out, for merge neurons and selection by saliency; twice the work.",
)
@click.option("--seed", type=int, help="Seed of the draw.")
@section_option("collect section, e.g. sampling.candidates=50000 or data.NAME=0.75")
@dtype_option
@device_option
@click.option(
    "--shard",
    metavar="NUMBER/COUNT",
    help="Route only this part of the tokens, e.g. 1/4; other processes or machines do the rest.",
)
@click.option(
    "--merge",
    "merged",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Instead of routing anything, add up what these folders hold; given for each of them.",
)
@revision_option
@out_option
@json_option
@in_processes
def command(
    model: str | None,
    data: tuple[str, ...],
    tokens: int | None,
    sequence_length: int | None,
    batch_size: int | None,
    sampling: str | None,
    keep_probabilities: str | None,
    expert_norms: bool | None,
    seed: int | None,
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    shard: str | None,
    merged: tuple[Path, ...],
    revision: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Gather the router statistics of MODEL over your data.

    Writes router_stats.safetensors, a few megabytes however many tokens there are, a few inputs of each layer for the
    report of `nexus convert`, and how the text was drawn. Of a converted model it is the base in it that is asked.
    Interrupted or killed, the same command goes on where it stopped.

    Large jobs can be cut in parts with --shard and put together again: `nexus collect --merge A --merge B --out DIR`
    gives what one pass would have given. Folders over other data of the same model can be added up as well.
    """
    with failure_as_json(as_json):
        if merged:
            metrics = _merge(merged, model, data, out)
        else:
            values = {
                "tokens": tokens,
                "sequence_length": sequence_length,
                "batch_size": batch_size,
                "sampling": {"strategy": sampling} if sampling else None,
                "keep_probabilities": _number_or_all(keep_probabilities),
                "expert_norms": expert_norms,
                "seed": seed,
            }
            metrics = _collect(model, data, values, assignments, dtype, device, shard, revision, out)
    print_done(
        *(as_json, {"path": out, "metrics": metrics}),
        lambda: [*([] if merged else _drawn(out)), *_as_text(out, metrics, is_part=shard is not None)],
    )


def _collect(
    model: str | None,
    data: tuple[str, ...],
    values: dict[str, Any],
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    shard: str | None,
    revision: str | None,
    out: Path,
) -> Mapping[str, Any]:
    from nexus_core.checkpoint.fingerprint import fingerprint
    from nexus_core.checkpoint.source import open_checkpoint
    from nexus_core.errors import UsageError
    from nexus_core.models import choose_device, compute_dtype
    from nexus_core.recipe.load import section_from
    from nexus_core.recipe.schema import Collect
    from nexus_core.stages.collect import STAGE, collect
    from nexus_core.stages.shards import WHOLE, read_shard

    if model is None or not data:
        raise UsageError("name a model and at least one --data FILE to route through it, or folders to --merge")
    sets = named_sources(tuple(item if "=" in item else f"{DEFAULT_SET}={item}" for item in data), "--data")
    settings = section_from(Collect, {"data": dict.fromkeys(sets, 1.0), **values}, assignments)
    place = choose_device(device)
    part = read_shard(shard) if shard else WHOLE
    checkpoint = open_checkpoint(model, revision)
    identity = {
        "version": STAGE.version,
        "model": fingerprint(checkpoint.folder),
        "settings": settings.model_dump(mode="json"),
        "data": contents(sets),
        "dtype": dtype,
        "shard": str(part),
    }
    with resumable_folder(out, identity) as folder:
        return collect(
            *(checkpoint, sets, settings, folder),
            device=place,
            dtype=compute_dtype(dtype, place),
            part="all",
            shard=part,
        )


def _merge(folders: tuple[Path, ...], model: str | None, data: tuple[str, ...], out: Path) -> Mapping[str, Any]:
    from nexus_core.errors import UsageError
    from nexus_core.pipeline.store import atomic_folder
    from nexus_core.stages.merge_collected import merge_collected

    if model is not None or data:
        raise UsageError("--merge adds up folders that are there; leave out the model and --data")
    with atomic_folder(out) as folder:
        return merge_collected(folders, folder)


def _number_or_all(text: str | None) -> bool | int | str | None:
    if text == "all":
        return True
    return int(text) if text and text.isdecimal() else text


def _drawn(out: Path) -> list[str]:
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
    return lines


def _as_text(out: Path, metrics: Mapping[str, Any], *, is_part: bool) -> list[str]:
    """is_part: of the tokens; what is next is then not to be done with it alone."""
    lines = [
        f"routers     entropy {metrics['router_entropy_nats']:.2f} nats, "
        f"{metrics['router_entropy_share_of_even']:.0%} of an even spread; "
        f"{metrics['experts_never_chosen']} experts never chosen",
        "",
        f"statistics  {out}",
    ]
    return lines if is_part else [*lines, f"next        nexus select {out} --out DIR"]
