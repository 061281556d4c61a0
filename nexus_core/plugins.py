"""Finds plugins, refuses misspelt hooks, and gives each checkpoint to the one family that owns it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from nexus_core import defaults, hookspecs
from nexus_core.errors import CheckpointError, PluginError, suggestion
from nexus_core.types import EmbeddedFile, Strategy

ENTRY_POINT_GROUP = "nexus.plugins"
DEFAULTS = "nexus_core"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why; the others work on."""

    name: str
    source: str
    reason: str


class Plugins:
    """The registered plugins and their hooks.

    hook: calls every plugin. broken: what could not be registered; reported, never fatal for other plugins.
    """

    def __init__(self, points: Iterable[EntryPoint] = ()):
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.manager.register(defaults, name=DEFAULTS)
        self.broken: list[BrokenPlugin] = []
        self.sources: dict[str, str] = {DEFAULTS: "built in"}
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
        except Exception as error:  # whatever a third-party module raises at import is reported under its name
            self.broken.append(BrokenPlugin(point.name, source, f"{type(error).__name__}: {error}"))
            log.warning("plugin '%s' (%s) is left out: %s: %s", point.name, source, type(error).__name__, error)

    def register(self, plugin: object, name: str, source: str) -> None:
        """Add one plugin. Raises PluginError if a hook's name or argument is not one of hookspecs.py."""
        known = {hook for hook in vars(hookspecs) if hook.startswith("nexus_")}
        for attribute in dir(plugin):
            if self.manager.parse_hookimpl_opts(plugin, attribute) is not None and attribute not in known:
                raise PluginError(f"'{attribute}' is not a hook of NEXUS{suggestion(attribute, known)}")
        try:
            self.manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            # Before 1.7 pluggy keeps a half-registered plugin: take it out, so that its good hooks don't answer either.
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            raise PluginError(str(error).strip().replace("\n", " ")) from error
        except ValueError as error:
            raise PluginError(f"plugin '{name}' ({source}) is registered already; uninstall one of the two") from error
        self.sources[name] = source

    def unregister(self, name: str) -> None:
        """Take a plugin out again; one that is not there is left out already."""
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)
        self.sources.pop(name, None)

    def names(self) -> list[str]:
        """Registered plugins by name, core's defaults first."""
        return [name for name, _ in self.manager.list_name_plugin()]

    def family(self, config: Mapping[str, Any], where: str) -> Family:
        """The family that owns a checkpoint with this config.

        where: the folder, for the error. Raises CheckpointError if no plugin or more than one claims it.
        """
        claimants = []
        for name, plugin in self.manager.list_name_plugin():
            caller = self.manager.subset_hook_caller(
                "nexus_claims", [other for _, other in self.manager.list_name_plugin() if other is not plugin]
            )
            if any(caller(config=config)):
                claimants.append(name)
        if len(claimants) == 1:
            return Family(claimants[0], self)
        model_type = config.get("model_type")
        if not claimants:
            raise CheckpointError(
                f"{where}: no plugin claims model_type '{model_type}'; `nexus plugins` lists the installed families, "
                "docs/hooks.md says how to add one"
            )
        raise CheckpointError(
            f"{where}: model_type '{model_type}' is claimed by {len(claimants)} plugins ({', '.join(claimants)}); "
            "uninstall all but one"
        )

    def strategies(self, kind: str) -> dict[str, Strategy]:
        """All strategies of one kind by name: "selection", "merge", "routing", "losses" or "data_formats".

        Raises PluginError if two plugins register the same name.
        """
        hook_name = kind if kind in ("losses", "data_formats") else f"{kind}_strategies"
        found: dict[str, Strategy] = {}
        for answers in reversed(getattr(self.hook, f"nexus_{hook_name}")()):
            for strategy in answers:
                if strategy.name in found:
                    raise PluginError(f"two plugins register the {kind} strategy '{strategy.name}'; uninstall one")
                found[strategy.name] = strategy
        return found

    def embedded(self) -> dict[str, EmbeddedFile]:
        """All embedded checkpoints and data sets by name."""
        return {file.name: file for answers in self.hook.nexus_embedded_files() for file in answers}


class Family:
    """One model family: the owner's hooks, with core's defaults behind them.

    hook: as `Plugins.hook`, asked of the owner and the defaults only.
    """

    def __init__(self, name: str, plugins: Plugins):
        self.name = name
        self._plugins = plugins
        self.hook = _FamilyHooks(name, plugins.manager)

    def __repr__(self) -> str:
        return f"Family({self.name!r})"


class _FamilyHooks:
    def __init__(self, owner: str, manager: pluggy.PluginManager):
        self._owner, self._manager = owner, manager

    def __getattr__(self, hook_name: str) -> Any:
        others = [p for name, p in self._manager.list_name_plugin() if name not in (self._owner, DEFAULTS)]
        caller = self._manager.subset_hook_caller(hook_name, others)

        def ask(**arguments: Any) -> Any:
            answer = caller(**arguments)
            if answer is None:
                raise PluginError(f"plugin '{self._owner}' claims this model but does not answer {hook_name}")
            return answer

        return ask


@lru_cache(maxsize=1)
def installed() -> Plugins:
    """The plugins of this environment, found once."""
    return Plugins(entry_points(group=ENTRY_POINT_GROUP))
