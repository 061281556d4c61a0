"""The command `nexus`: one module per command, imported when it is typed, so that help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import click

from nexus_core import __version__
from nexus_core.cli.launch import die_with_launcher, end_process
from nexus_core.cli.output import exit_code_of, open_closed_streams, quieten
from nexus_core.processes import world_if_any

# name: what `nexus --help` says of it. The command itself is `nexus_core.cli.NAME.command`.
COMMANDS = {
    "run": "Run a recipe: every stage whose output is not there yet.",
    "check": "Validate a recipe and show what running it would take.",
    "doctor": "Look a model over: whole, sound, and how fast here.",
    "explain": "Say why each stage would be reused or has to run.",
    "collect": "Gather router statistics of a model over your data.",
    "select": "Rank each layer's experts and choose which to build from.",
    "convert": "Give a model one shared expert per layer.",
    "generate": "Have a model write text after prompts, to keep it by.",
    "capture": "Store a teacher's outputs, to train without running it.",
    "train": "Train the shared experts of a converted model.",
    "validate": "Measure what was gained and what was forgotten.",
    "chat": "Talk to a model, base or trained.",
    "compare": "Set runs side by side: settings, gain, retention.",
    "plugins": "List the installed plugins and what they bring.",
}


class Commands(click.Group):
    """Core's commands by name, then the plugins'; neither is imported before it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            return import_module(f"nexus_core.cli.{cmd_name}").command
        return self._from_plugins().get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from nexus_core.errors import suggestion

            ctx.fail(f"there is no command '{args[0]}'{suggestion(args[0], [*COMMANDS, *self._from_plugins()])}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would import every command for its first line of help.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    @staticmethod
    def _from_plugins() -> Mapping[str, click.Command]:
        from nexus_core.plugins import installed

        return installed().commands()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with `nexus run recipes/tiny.yaml`; `nexus COMMAND --help` says more about each.",
)
@click.version_option(__version__, prog_name="nexus")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; may stand anywhere in the line.")
def nexus(debug: bool) -> None:
    """Make a large mixture-of-experts model good at your domain: one always-on shared expert per layer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    open_closed_streams()
    quieten(debug)
    try:
        # Not standalone: click would print its errors itself, and swallow the traceback that --debug is for.
        die_with_launcher()
        words = [word for word in given if word != "--debug"]
        answer = nexus.main(words, "nexus", standalone_mode=False, obj=given)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error, debug)
        if not world_if_any().alone:
            # What libraries do at the end may wait for a process that is gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    code = answer if isinstance(answer, int) else 0
    if not world_if_any().alone:
        end_process(code)
    sys.exit(code)
