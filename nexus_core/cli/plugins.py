"""`nexus plugins`: what is installed, what it brings, and what is broken."""

from __future__ import annotations

from typing import Any

import click

from nexus_core.cli.output import failure_as_json, json_option, print_json

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


@click.command("plugins")
@json_option
def command(as_json: bool) -> None:
    """List the installed plugins, their model families, strategies and embedded files, and the broken ones."""
    with failure_as_json(as_json):
        from nexus_core.plugins import installed

        plugins = installed()
        found = {name: _describe(plugins, name) for name in plugins.names()}
        broken = [{"name": item.name, "source": item.source, "reason": item.reason} for item in plugins.broken]
    if as_json:
        print_json({"status": "done", "plugins": found, "broken": broken})
        return
    for name, described in found.items():
        click.echo(f"{click.style(name, bold=True)}  {described['source']}")
        if described["is_family"]:
            click.echo("  model family")
        for kind, brought in described["brings"].items():
            click.echo(f"  {kind:<10} {', '.join(brought)}")
    for item in broken:
        click.echo(f"{click.style(item['name'], bold=True)}  {item['source']}  {click.style('broken', fg='red')}")
        click.echo(f"  {item['reason']}")


def _describe(plugins: Any, name: str) -> dict[str, Any]:
    others = [plugin for other, plugin in plugins.manager.list_name_plugin() if other != name]
    brings = {}
    for hook, kind in REGISTERING.items():
        try:
            answers = plugins.manager.subset_hook_caller(hook, others)()
            names = sorted(item.name for items in answers for item in items)
        except Exception as error:  # one plugin's fault is what this list is there to show
            names = [f"failed in {hook}: {type(error).__name__}: {error}"]
        if names:
            brings[kind] = names
    plugin = plugins.manager.get_plugin(name)
    return {
        "source": plugins.sources[name],
        "is_family": hasattr(plugin, "nexus_claims"),
        "brings": brings,
    }
