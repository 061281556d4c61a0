"""`nexus generate`: what a model writes after prompts, as tokens to train on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nexus_core.cli.folders import resumable_folder
from nexus_core.cli.launch import in_processes
from nexus_core.cli.options import device_option, dtype_option, json_option, out_option, revision_option, section_option
from nexus_core.cli.output import failure_as_json, print_done
from nexus_core.cli.sources import contents

# The file that is written, and what a set of it is called in the command that is shown.
NAME = "completions"


@click.command("generate")
@click.argument("model")
@click.option("--prompts", metavar="FILE", multiple=True, required=True, help="Prompts; may be given again.")
@click.option("--max-new-tokens", type=int, help="Tokens written after a prompt, at most.  [default: 512]")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: 1.0]")
@click.option("--samples", type=int, help="Completions per prompt.  [default: 1]")
@click.option("--batch-size", type=int, help="Completions written at once.  [default: 16]")
@click.option("--seed", type=int, help="Seed of the draws.")
@click.option("--base", is_flag=True, help="Of a converted or trained model have the base in it write.")
@section_option("section under generate, e.g. top_p=0.95 or prompts.0.fields.prompt=question")
@dtype_option
@device_option
@revision_option
@out_option
@json_option
@in_processes
def command(
    model: str,
    prompts: tuple[str, ...],
    max_new_tokens: int | None,
    temperature: float | None,
    samples: int | None,
    batch_size: int | None,
    seed: int | None,
    base: bool,
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    revision: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Have MODEL answer prompts in its own message format, and go on with running text.

    Writes DIR/completions.jsonl: tokens, with the text beside them for people. It is a data source like any other, for
    recipes and for --keep: kept text that the model wrote itself holds on to its ways of answering, reasoning and
    calling tools, which other people's prose does not show. Interrupted or killed, the same command goes on where it
    stopped.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.fingerprint import fingerprint
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.models import choose_device
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Generate
        from nexus_core.stages.generate import STAGE, generate

        values = {
            "prompts": [{"path": path} for path in prompts],
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "samples": samples,
            "batch_size": batch_size,
            "seed": seed,
        }
        settings = section_from(Generate, values, assignments)
        place = choose_device(device)
        checkpoint = open_checkpoint(model, revision)
        identity = {
            "version": STAGE.version,
            "model": fingerprint(checkpoint.folder),
            "base": base,
            "settings": settings.model_dump(mode="json"),
            "data": contents({NAME: settings.prompts}),
            "dtype": dtype,
        }
        with resumable_folder(out, identity) as folder:
            metrics = generate(checkpoint, {NAME: settings}, folder, dtype=dtype, device=place, base=base)
    print_done(as_json, {"path": out, "metrics": metrics}, lambda: _as_text(out, metrics))


def _as_text(out: Path, metrics: Mapping[str, Any]) -> list[str]:
    file = shlex.quote(str(out / f"{NAME}.jsonl"))
    lines = [
        f"written     {metrics['completions']:,} completions, {metrics['completion_tokens']:,} tokens",
        f"left out    {metrics['empty']:,} empty ones; {metrics['cut']:,} of the others were cut at --max-new-tokens",
    ]
    return [*lines, "", f"next        nexus train CONVERTED --learn domain=FILE --keep general={file} --out DIR"]
