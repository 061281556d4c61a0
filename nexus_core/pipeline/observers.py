"""Tells plugins what a run does; one that fails is left alone from then on, and the run goes on."""

from __future__ import annotations

import logging
from typing import Any

from nexus_core.plugins import Plugins

log = logging.getLogger(__name__)


class Observers:
    """Every plugin's observing hooks, each called by itself, so that one failing plugin silences no other."""

    def __init__(self, plugins: Plugins):
        self._plugins = plugins
        self._callers: dict[str, list[tuple[str, Any]]] = {}
        self._failed: set[tuple[str, str]] = set()

    def tell(self, hook_name: str, **arguments: Any) -> None:
        """Call one observing hook of every plugin that has it; the first failure of each is logged as a warning."""
        for plugin, caller in self._of(hook_name):
            try:
                caller(**arguments)
            except Exception as error:  # a third party's code: whatever it raises must not cost hours of work
                if (plugin, hook_name) not in self._failed:
                    self._failed.add((plugin, hook_name))
                    log.warning(
                        "plugin '%s' failed in %s and what it observes may be incomplete: %s: %s",
                        *(plugin, hook_name, type(error).__name__, error),
                    )

    def _of(self, hook_name: str) -> list[tuple[str, Any]]:
        if hook_name not in self._callers:
            manager = self._plugins.manager
            everyone = manager.list_name_plugin()
            names = [
                (name, plugin)
                for name, plugin in everyone
                if any(item.plugin is plugin for item in getattr(manager.hook, hook_name).get_hookimpls())
            ]
            self._callers[hook_name] = [
                (name, manager.subset_hook_caller(hook_name, [other for _, other in everyone if other is not plugin]))
                for name, plugin in names
            ]
        return self._callers[hook_name]
