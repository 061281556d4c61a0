"""Finds plugins, refuses misspelt hooks, and gives each checkpoint to the one family that owns it.

A plugin is somebody else's code, so nothing it does may take the program down for those who do not use it: what cannot
be registered is left out, what fails in a question that every plugin is asked counts as no answer, and both are named.
Only the family that owns the checkpoint at hand, and a strategy that is chosen, can make a command fail.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from nexus_core import defaults, hookspecs
from nexus_core.errors import CheckpointError, NexusError, PluginError, is_out_of_memory
from nexus_core.registration import HOOK_NAMES, check_arguments, check_names, stated_version, version_advice
from nexus_core.types import EmbeddedFile, Strategy

if TYPE_CHECKING:
    import click

ENTRY_POINT_GROUP = "nexus.plugins"
DEFAULTS = "nexus_core"

STRATEGY_HOOKS = {
    "selection": "nexus_selection_strategies",
    "merge": "nexus_merge_strategies",
    "routing": "nexus_routing_strategies",
    "losses": "nexus_losses",
    "data_formats": "nexus_data_formats",
}

log = logging.getLogger(__name__)

Named = TypeVar("Named")


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why; the others work on."""

    name: str
    source: str
    reason: str


class Offers(dict[str, Named]):
    """What plugins bring of one kind, by name. A name that two of them bring is refused when it is asked for.

    disputed: those names, and why they cannot be had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.disputed: dict[str, str] = {}

    def __missing__(self, name: str) -> Named:
        self._refuse_disputed(name)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        self._refuse_disputed(name)
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._refuse_disputed(name)
        return super().get(name, default)

    def _refuse_disputed(self, name: object) -> None:
        if name in self.disputed:
            raise PluginError(self.disputed[str(name)])


class Plugins:
    """The registered plugins and their hooks.

    hook: calls every plugin. broken: what could not be registered; reported, never fatal for other plugins. sources:
    the distribution that each came from, by name; modules: its module, of those that came by an entry point.
    """

    def __init__(self, points: Iterable[EntryPoint] = ()):
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.manager.register(defaults, name=DEFAULTS)
        self.broken: list[BrokenPlugin] = []
        self.sources: dict[str, str] = {DEFAULTS: "built in"}
        self.modules: dict[str, str] = {}
        self._told: set[str] = set()
        for point in points:
            self._load(point)

    @property
    def hook(self) -> Any:
        return self.manager.hook

    def _load(self, point: EntryPoint) -> None:
        distribution = point.dist
        source = f"{distribution.name} {distribution.version}" if distribution else point.value
        try:
            self.register(point.load(), point.name, source)
            self.modules[point.name] = point.module
        except PluginError as error:
            self._leave_out(point.name, source, str(error))
        except (Exception, SystemExit) as error:  # whatever a third-party module raises at import
            self._leave_out(point.name, source, f"{type(error).__name__}: {error}")

    def _leave_out(self, name: str, source: str, reason: str) -> None:
        self.broken.append(BrokenPlugin(name, source, reason))
        log.warning("plugin '%s' (%s) is left out: %s", name, source, reason)

    def register(self, plugin: object, name: str, source: str) -> None:
        """Add one plugin. Raises PluginError if it does not fit hookspecs.py; then none of its hooks is used."""
        advice = version_advice(stated_version(plugin))
        check_arguments(plugin, check_names(self.manager, plugin, advice), advice)
        try:
            self.manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            # Before 1.7 pluggy keeps a half-registered plugin: take it out, so that its good hooks don't answer either.
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            raise PluginError(str(error).strip().replace("\n", " ") + advice) from error
        except ValueError as error:
            raise PluginError(f"plugin '{name}' ({source}) is registered already; uninstall one of the two") from error
        self.sources[name] = source
        if advice:
            self._warn_once(f"plugin '{name}' ({source}) is used as it is{advice}")

    def unregister(self, name: str) -> None:
        """Take a plugin out again; one that is not there is left out already."""
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)
        self.sources.pop(name, None)

    def names(self) -> list[str]:
        """Registered plugins by name, core's defaults first."""
        return [name for name, _ in self.manager.list_name_plugin()]

    def hooks_of(self, name: str) -> list[str]:
        """The hooks that a plugin answers, in the order of hookspecs.py."""
        plugin = self.manager.get_plugin(name)
        found = {caller.name for caller in self.manager.get_hookcallers(plugin) or ()}
        return [hook for hook in HOOK_NAMES if hook in found]

    def ask_one(self, name: str, hook_name: str, **arguments: Any) -> Any:
        """One plugin's own answer to a hook, None if it has none. Raises PluginError if it fails."""
        plugin = self.manager.get_plugin(name)
        others = [other for _, other in self.manager.list_name_plugin() if other is not plugin]
        try:
            answer = self.manager.subset_hook_caller(hook_name, others)(**arguments)
        except Exception as error:
            if isinstance(error, NexusError) or is_out_of_memory(error) or name == DEFAULTS:
                raise
            raise PluginError(failure(name, self.sources[name], hook_name, error)) from error
        if getattr(hookspecs, hook_name).nexus_spec["firstresult"]:
            return answer
        return answer[0] if answer else None

    def ask_each(self, hook_name: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Every plugin's answer to a hook, by the plugin's name; None is no answer.

        A plugin that raises is named in a warning, once, and left out. Core's own failures are not its to hide.
        """
        for name in self.names():
            if hook_name not in self.hooks_of(name):
                continue
            try:
                answer = self.ask_one(name, hook_name, **arguments)
            except NexusError as error:
                if name == DEFAULTS:
                    raise
                self._warn_once(str(error))
                continue
            if answer is not None:
                yield name, answer

    def family(self, config: Mapping[str, Any], where: str) -> Family:
        """The family that owns a checkpoint with this config.

        where: the folder, for the error. Raises CheckpointError if no plugin or more than one claims it.
        """
        claimants = [name for name, claims in self.ask_each("nexus_claims", config=config) if claims]
        if len(claimants) == 1:
            return Family(claimants[0], self)
        model_type = config.get("model_type")
        if not claimants:
            # The plugin that would have claimed it may be one of those that could not be asked.
            broken = ", ".join(plugin.name for plugin in self.broken)
            hint = f"; broken and not asked: {broken}" if broken else ""
            raise CheckpointError(
                f"{where}: no plugin claims model_type '{model_type}'; `nexus plugins` lists the installed families, "
                f"docs/add_a_family.md says how to add one{hint}"
            )
        raise CheckpointError(
            f"{where}: model_type '{model_type}' is claimed by {len(claimants)} plugins ({', '.join(claimants)}); "
            "uninstall all but one"
        )

    def strategies(self, kind: str) -> Offers[Strategy]:
        """All strategies of one kind by name: "selection", "merge", "routing", "losses" or "data_formats".

        Looking up a name that two plugins register raises PluginError.
        """
        return self._offers(STRATEGY_HOOKS[kind], Strategy, f"{kind} strategy")

    def embedded(self) -> Offers[EmbeddedFile]:
        """All embedded checkpoints and data sets by name."""
        return self._offers("nexus_embedded_files", EmbeddedFile, "embedded file")

    def commands(self) -> Offers[click.Command]:
        """The plugins' commands by name."""
        import click

        return self._offers("nexus_cli_commands", click.Command, "command")

    def _offers(self, hook_name: str, kind: type[Named], what: str) -> Offers[Named]:
        offers: Offers[Named] = Offers()
        owners: dict[str, str] = {}
        for plugin, brought in self.ask_each(hook_name):
            if not isinstance(brought, list | tuple) or not all(isinstance(item, kind) for item in brought):
                self._warn_once(
                    f"plugin '{plugin}' ({self.sources[plugin]}) answers {hook_name} with {brought!r:.60}, not with a "
                    f"list of {kind.__name__}; what it brings is left out"
                )
                continue
            for item in brought:
                name = str(item.name)
                if owners.get(name) == DEFAULTS:
                    self._warn_once(
                        f"plugin '{plugin}' ({self.sources[plugin]}) registers the {what} '{name}', which NEXUS itself "
                        "has; NEXUS's own is used"
                    )
                elif name in owners:
                    offers.pop(name, None)
                    both = f"two plugins register the {what} '{name}', {owners[name]} and {plugin}"
                    offers.disputed[name] = f"{both}; uninstall one"
                else:
                    owners[name] = plugin
                    offers[name] = item
        return offers

    def _warn_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


class Family:
    """One model family: the owner's hooks, with core's defaults behind them.

    hook: as `Plugins.hook`, asked of the owner and the defaults only.
    """

    def __init__(self, name: str, plugins: Plugins):
        self.name = name
        self._plugins = plugins
        self.hook = _FamilyHooks(name, plugins)

    def answers(self, hook_name: str) -> bool:
        """Whether the owner itself implements a hook."""
        return hook_name in self._plugins.hooks_of(self.name)

    def __repr__(self) -> str:
        return f"Family({self.name!r})"


class _FamilyHooks:
    def __init__(self, owner: str, plugins: Plugins):
        self._owner, self._plugins = owner, plugins

    def __getattr__(self, hook_name: str) -> Any:
        manager = self._plugins.manager
        others = [p for name, p in manager.list_name_plugin() if name not in (self._owner, DEFAULTS)]
        caller = manager.subset_hook_caller(hook_name, others)

        def ask(**arguments: Any) -> Any:
            try:
                answer = caller(**arguments)
            except Exception as error:
                if isinstance(error, NexusError) or is_out_of_memory(error):
                    raise
                source = self._plugins.sources.get(self._owner, "")
                raise PluginError(failure(self._owner, source, hook_name, error)) from error
            if answer is None:
                raise PluginError(f"plugin '{self._owner}' claims this model but does not answer {hook_name}")
            return answer

        return ask


def failure(plugin: str, source: str, hook_name: str, error: BaseException) -> str:
    """A plugin's own mistake in a hook, as the person at the keyboard reads it."""
    first_line = str(error).strip().partition("\n")[0]
    return (
        f"plugin '{plugin}' ({source}) failed in {hook_name}: {type(error).__name__}: {first_line}; "
        "tell its author, --debug shows where it happened"
    )


@lru_cache(maxsize=1)
def installed() -> Plugins:
    """The plugins of this environment, found once."""
    return Plugins(entry_points(group=ENTRY_POINT_GROUP))
