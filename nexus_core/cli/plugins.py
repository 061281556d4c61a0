"""`nexus plugins`: what is installed, brought and broken; who owns a checkpoint; a new plugin to start from."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_core.cli.options import json_option
from nexus_core.cli.output import FAILED, failure_as_json, print_done, print_json

if TYPE_CHECKING:
    from nexus_core.plugins import Plugins

# Registering hook: what its answers are called here.
REGISTERING = {
    "nexus_selection_strategies": "selection",
    "nexus_merge_strategies": "merge",
    "nexus_routing_strategies": "routing",
    "nexus_losses": "losses",
    "nexus_data_formats": "formats",
    "nexus_embedded_files": "embedded",
    "nexus_cli_commands": "commands",
}

# A model of this many bytes is loaded without being asked twice.
SMALL_MODEL_BYTES = 4_000_000_000


@click.group("plugins", invoke_without_command=True)
@click.option(
    "--check",
    "checkpoint",
    metavar="CHECKPOINT",
    help="Say who owns this model folder, Hub id or embedded:NAME, and what they answer, hook by hook.",
)
@click.option("--load", "loads", is_flag=True, help="With --check: load the model even if it is large.")
@json_option
@click.pass_context
def command(context: click.Context, checkpoint: str | None, loads: bool, as_json: bool) -> None:
    """List the installed plugins, their model families, strategies and embedded files, and the broken ones."""
    if context.invoked_subcommand:
        return
    all_answer = True
    with failure_as_json(as_json):
        if checkpoint is None:
            _list(as_json)
        else:
            all_answer = _check(checkpoint, loads, as_json)
    if not all_answer:
        raise click.exceptions.Exit(FAILED)


@command.command("new")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write, by default nexus-NAME here.")
@json_option
def new(name: str, out: Path | None, as_json: bool) -> None:
    """Write a family plugin to start from: an installable package with the family contract as its tests.

    NAME: the family's model_type, such as my_moe.
    """
    with failure_as_json(as_json):
        from nexus_core.new_plugin import write_plugin
        from nexus_core.pipeline.disk import atomic_folder

        folder = out or Path(f"nexus-{name.replace('_', '-')}")
        with atomic_folder(folder) as partial:
            files = [path.relative_to(partial) for path in write_plugin(name, partial)]
    next_line = f"next: cd {folder} && pip install -e . && pytest   (then its README.md)"
    print_done(
        *(as_json, {"folder": folder, "files": files}), lambda: [*(f"  {folder / path}" for path in files), next_line]
    )


def _list(as_json: bool) -> None:
    from nexus_core.hookspecs import HOOKS_VERSION
    from nexus_core.plugins import installed

    plugins = installed()
    found = {name: _describe(plugins, name) for name in plugins.names()}
    broken = [{"name": item.name, "source": item.source, "reason": item.reason} for item in plugins.broken]
    if as_json:
        print_json({"status": "done", "hooks_version": HOOKS_VERSION, "plugins": found, "broken": broken})
        return
    for name, described in found.items():
        click.echo(f"{click.style(name, bold=True)}  {described['source']}  {_stated(described['hooks_version'])}")
        if described["folder"]:
            click.echo(f"  from       {described['folder']}")
        if described["is_family"]:
            types = described["model_types"]
            click.echo(f"  family     {', '.join(types) if types else 'by nexus_claims'}")
        for kind, brought in described["brings"].items():
            click.echo(f"  {kind:<10} {', '.join(brought)}")
        for problem in described["problems"]:
            click.echo(f"  {click.style('fails', fg='red')}      {problem}")
    for item in broken:
        click.echo(f"{click.style(item['name'], bold=True)}  {item['source']}  {click.style('broken', fg='red')}")
        click.echo(f"  {item['reason']}")


def _stated(version: int | None) -> str:
    return "hooks version not stated" if version is None else f"hooks version {version}"


def _describe(plugins: Plugins, name: str) -> dict[str, Any]:
    from nexus_core.errors import PluginError
    from nexus_core.hookspecs import HOOKS_VERSION
    from nexus_core.plugins import DEFAULTS
    from nexus_core.registration import stated_version

    brings, problems = {}, []
    hooks = plugins.hooks_of(name)
    if "nexus_claims" in hooks:
        try:
            plugins.ask_one(name, "nexus_claims", config={"model_type": name})
        except PluginError as error:
            problems.append(str(error))
    for hook, kind in REGISTERING.items():
        if hook not in hooks:
            continue
        try:
            names = sorted(item.name for item in plugins.ask_one(name, hook) or ())
        except PluginError as error:
            problems.append(str(error))
        except (AttributeError, TypeError) as error:
            problems.append(f"{hook} does not answer with a list of named things: {error}")
        else:
            brings[kind] = names
    plugin = plugins.manager.get_plugin(name)
    return {
        "source": plugins.sources[name],
        "folder": _folder(plugins.modules.get(name)),
        "hooks_version": HOOKS_VERSION if name == DEFAULTS else stated_version(plugin),
        "is_family": "nexus_claims" in hooks,
        "model_types": _model_types(plugins, name) if "nexus_claims" in hooks else [],
        "brings": brings,
        "hooks": hooks,
        "problems": problems,
    }


def _folder(module_name: str | None) -> str | None:
    """Where a plugin's code lies."""
    file = getattr(sys.modules.get(module_name or ""), "__file__", None)
    return str(Path(file).parent) if file else None


def _model_types(plugins: Plugins, name: str) -> list[str]:
    """The model types a plugin claims, of those that transformers has, its own name, and its layouts'."""
    from nexus_core.errors import PluginError

    # Named as their folders are; importing transformers to ask would take a second.
    package = find_spec("transformers")
    folders = [Path(place) / "models" for place in package.submodule_search_locations or ()] if package else []
    known = {folder.name for models in folders if models.is_dir() for folder in models.iterdir()}
    own = {row.model_type for row in getattr(plugins.manager.get_plugin(name), "layouts", ())}
    try:
        return [
            t for t in sorted(known | own | {name}) if plugins.ask_one(name, "nexus_claims", config={"model_type": t})
        ]
    except PluginError:
        return []  # it is told among the problems


def _check(name: str, loads: bool, as_json: bool) -> bool:
    """Whether every hook has an answer."""
    from nexus_core.answers import answers
    from nexus_core.checkpoint.source import open_checkpoint
    from nexus_core.plugins import installed

    checkpoint = open_checkpoint(name)
    stored = sum(entry.stored_bytes for entry in checkpoint.reader.entries.values())
    family = checkpoint.family.name
    source = installed().sources[family]
    found = []
    if not as_json:
        click.echo(f"{checkpoint.folder}: claimed by {click.style(family, bold=True)} ({source})")
    for answer in answers(checkpoint, loads_model=loads or stored <= SMALL_MODEL_BYTES):
        found.append(answer)
        if not as_json:
            mark = click.style("refuses", fg="red") if answer.failed else "default" if answer.by == "nexus_core" else ""
            click.echo(f"  {answer.hook.removeprefix('nexus_'):<22} {mark:<8} {answer.text}")
    failed = [answer.hook for answer in found if answer.failed]
    if as_json:
        told = {a.hook: {"by": a.by, "answer": a.text, "failed": a.failed} for a in found}
        status = "failed" if failed else "done"
        print_json(
            {"status": status, "checkpoint": checkpoint.folder, "family": family, "source": source, "hooks": told}
        )
    elif failed:
        click.echo(f"{len(failed)} of {len(found)} hooks have no usable answer", err=True)
    else:
        click.echo("every hook answers; next: pytest --nexus-contract " + name)
    return not failed
