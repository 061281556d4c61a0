"""`nexus compare`: recorded runs side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from nexus_core.cli.options import json_option
from nexus_core.cli.output import failure_as_json, print_json

# Wide enough for three runs when nobody looks at the output.
WIDTH_WITHOUT_TERMINAL = 160


@click.command("compare")
@click.argument("named", metavar="[RUN]...", nargs=-1)
@click.option("--store", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Run store.")
@click.option("--uri", metavar="URI", help="MLflow tracking URI, if the runs were not recorded in the store.")
@click.option("--experiment", metavar="NAME", help="Only runs of this MLflow experiment.")
@click.option("--last", metavar="N", type=click.IntRange(1), help="The newest N finished runs, of whatever recipe.")
@json_option
def command(
    named: tuple[str, ...], store: Path, uri: str | None, experiment: str | None, last: int | None, as_json: bool
) -> None:
    """Set recorded runs side by side: settings that differ, gain, retention, router health, training, time.

    RUN is a recipe's name, which stands for its newest finished run, or the beginning of a run's id. Without any: the
    newest finished run of each recipe.
    """
    with failure_as_json(as_json):
        if named and last is not None:
            raise click.UsageError("give either runs by name or --last, not both")
        from nexus_core.report.comparison import as_json as comparison_as_json
        from nexus_core.report.comparison import as_text
        from nexus_core.track.connection import default_uri
        from nexus_core.track.runs import choose, recorded_runs

        runs = choose(recorded_runs(uri or default_uri(store.expanduser()), experiment), named, last)
    if as_json:
        print_json({"status": "done", **comparison_as_json(runs)})
    else:
        click.echo(as_text(runs, shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns))
