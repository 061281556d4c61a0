"""`nexus train`: distil a converted model's shared experts on your own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.output import failure_as_json, json_option, print_json

if TYPE_CHECKING:
    from nexus_core.recipe.schema import Source

IDENTITY_NAME = "nexus_train.json"


@click.command("train")
@click.argument("model")
@click.option("--learn", metavar="NAME=FILE", multiple=True, required=True, help="Data to learn; may be given again.")
@click.option(
    "--keep", metavar="NAME=FILE", multiple=True, help="Data to keep as the base does it; may be given again."
)
@click.option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@click.option("--learning-rate", type=float, help="Full learning rate of AdamW.  [default: 1e-5]")
@click.option("--routing", help="What of the router learns: frozen (the default), trainable or bias.")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Any key of a recipe's train section, e.g. sequence_length=512, losses.logits_kl=8.0 or data.NAME=0.75.",
)
@click.option("--dtype", default="auto", help="Type of the computation: auto, float32 or bfloat16.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto is a GPU if there is one.")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@json_option
def command(
    model: str,
    learn: tuple[str, ...],
    keep: tuple[str, ...],
    steps: int | None,
    learning_rate: float | None,
    routing: str | None,
    assignments: tuple[str, ...],
    dtype: str,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Train the shared experts of MODEL, which `nexus convert` wrote.

    Learns the text of --learn and keeps the base's predictions on the text of --keep. Whole files are used: hold back
    other files for `nexus validate`. Several files of one NAME are one data set; sets have equal shares. Interrupted
    or killed, the same command goes on where it stopped. DIR/model is the trained model.
    """
    with failure_as_json(as_json):
        from nexus_core.checkpoint.fingerprint import fingerprint
        from nexus_core.checkpoint.source import open_checkpoint
        from nexus_core.models import choose_device
        from nexus_core.pipeline.keys import data_identity
        from nexus_core.recipe.load import section_from
        from nexus_core.recipe.schema import Train
        from nexus_core.stages.train import MODEL_NAME, STAGE, train

        learnt, kept = named_sources(learn, "--learn"), named_sources(keep, "--keep")
        refuse_both(learnt, kept)
        sets = learnt | kept
        values = {
            "data": dict.fromkeys(sets, 1.0),
            "learn": list(learnt),
            "max_steps": steps,
            "learning_rate": learning_rate,
            "routing": {"strategy": routing} if routing else None,
        }
        settings = section_from(Train, values, assignments)
        checkpoint = open_checkpoint(model)
        place = choose_device(device)
        identity = {
            "version": STAGE.version,
            "model": fingerprint(checkpoint.folder),
            "settings": settings.model_dump(mode="json"),
            "data": {name: [data_identity(source.path) for source in sources] for name, sources in sets.items()},
            "dtype": dtype,
        }
        with resumable_folder(out, identity) as folder:
            metrics = train(checkpoint, sets, settings, list(learnt), folder, dtype=dtype, device=place)
    if as_json:
        print_json({"status": "done", "path": out, "model": out / MODEL_NAME, "metrics": metrics})
    else:
        click.echo("\n".join(_as_text(out, metrics, keep)))


def named_sources(given: tuple[str, ...], flag: str) -> dict[str, list[Source]]:
    """Data sets by name from `NAME=FILE` flags. Raises UsageError for one of another shape."""
    from nexus_core.errors import UsageError
    from nexus_core.recipe.schema import Source

    sets: dict[str, list[Source]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{flag} {text}: write NAME=FILE, for example {flag} general=general.txt")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"{flag} {text}: a name is made of letters, digits, '_' and '-'; rename '{name}'")
        sets.setdefault(name, []).append(Source(path=path, held_out=0.0))
    return sets


def refuse_both(learnt: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Raises UsageError if a data set is both to be learnt and to be kept."""
    from nexus_core.errors import UsageError

    for name in learnt:
        if name in kept:
            raise UsageError(f"'{name}' is given to --learn and to --keep; a data set is for one of them, rename one")


@contextmanager
def resumable_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well and stays, to go on in, when it does not.

    identity: what the output depends on; a folder that was left by work of another identity is refused. Raises
    UsageError for that, and if `out` is a file or not empty.
    """
    from nexus_core.errors import UsageError
    from nexus_core.pipeline.disk import storage_errors, sync_folder
    from nexus_core.pipeline.locks import exclusive

    out = Path(out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"--out {out}: is there already; name another folder, or delete it first")
    partial = out.with_name(f".{out.name}.partial")
    text = json.dumps(identity, indent=2, sort_keys=True) + "\n"
    with storage_errors(out.parent, "free some space and type the same command again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out.with_name(f".{out.name}.lock"), lambda owner: click.echo(f"waits for {owner}", err=True)):
            partial.mkdir(exist_ok=True)
            written = partial / IDENTITY_NAME
            if written.exists() and written.read_text() != text:
                raise UsageError(
                    f"--out {out}: {partial} was left by an interrupted training with another model, data or "
                    "settings; repeat that command to go on with it, or delete the folder"
                )
            written.write_text(text)
            try:
                yield partial
            except BaseException:
                # Without a checkpoint there is nothing to go on from.
                if not any(path.is_dir() for path in partial.iterdir()):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            written.unlink()
            sync_folder(partial)
            if out.is_dir():
                out.rmdir()
            partial.rename(out)


def _as_text(out: Path, metrics: Mapping[str, Any], keep: tuple[str, ...]) -> list[str]:
    lines = [
        f"trained     {metrics['trainable_parameters']:,} parameters in {metrics['steps']:,} steps, "
        f"{metrics['tokens']:,} tokens",
        f"loss        {metrics['loss_before']:.4g} at the start, {metrics['loss']:.4g} over the last tenth",
    ]
    parts = [f"{name} {metrics[name]:.4g}" for name in ("lm", "router_kl", "logits_kl") if name in metrics]
    if parts:
        lines.append(f"its parts   {', '.join(parts)}")
    if "router_l1" in metrics:
        lines.append(f"router      L1 distance to the base {metrics['router_l1']:.3g}")
    flags = " ".join(f"--data {name.partition('=')[0]}=FILE" for name in keep) or "--data NAME=FILE"
    return [*lines, "", f"model       {out / 'model'}", f"next        nexus validate {out / 'model'} {flags} --out DIR"]
