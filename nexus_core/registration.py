"""Does a plugin fit the hooks? Each mistake gets the sentence that its author needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches

import pluggy

from nexus_core import hookspecs
from nexus_core.errors import PluginError, suggestion

# What a plugin calls the version of the hooks it was written for.
VERSION_ATTRIBUTE = "NEXUS_HOOKS"

PREFIX = "nexus_"
HOOK_NAMES = [name for name in vars(hookspecs) if name.startswith(PREFIX)]


def stated_version(plugin: object) -> int | None:
    """The version of the hooks that a plugin says it was written for; None if it does not say.

    Raises PluginError if what it says is no number.
    """
    version = getattr(plugin, VERSION_ATTRIBUTE, None)
    if version is None or (isinstance(version, int) and not isinstance(version, bool)):
        return version
    raise PluginError(f"its {VERSION_ATTRIBUTE} is {version!r}; write the number {hookspecs.HOOKS_VERSION}")


def version_advice(written_for: int | None) -> str:
    """What to add to a sentence about a plugin of this version; nothing if it is this NEXUS's, or not stated."""
    current = hookspecs.HOOKS_VERSION
    if written_for is None or written_for == current:
        return ""
    remedy = "upgrade nexus-moe" if written_for > current else "upgrade the plugin, docs/hooks.md says what changed"
    return f"; it was written for version {written_for} of the hooks and this NEXUS has {current}: {remedy}"


def check_names(manager: pluggy.PluginManager, plugin: object, advice: str) -> list[str]:
    """The hooks that a plugin implements, at least one.

    Raises PluginError for a hook that is misspelt or has lost its @hookimpl, and for a plugin without any. advice:
    ends each sentence.
    """
    if inspect.isclass(plugin):
        raise PluginError(
            f"it is the class {plugin.__name__}, not an object; let the entry point name a module or an instance"
        )
    implemented = []
    for attribute in dir(plugin):
        if manager.parse_hookimpl_opts(plugin, attribute) is not None:
            if attribute not in HOOK_NAMES:
                raise PluginError(f"'{attribute}' is not a hook of NEXUS; {_near(attribute)}{advice}")
            implemented.append(attribute)
        elif attribute in HOOK_NAMES and callable(getattr(plugin, attribute, None)):
            raise PluginError(f"'{attribute}' would never be called: write @nexus_core.hookimpl above it")
    if not implemented:
        raise PluginError(
            f"it has no hook: none of its functions carries @nexus_core.hookimpl; see docs/add_a_family.md{advice}"
        )
    return implemented


def check_arguments(plugin: object, implemented: Sequence[str], advice: str) -> None:
    """Raise PluginError, with both names, if an implementation takes an argument that its hook does not have."""
    for name in implemented:
        known = list(inspect.signature(getattr(hookspecs, name)).parameters)
        for given in inspect.signature(getattr(plugin, name)).parameters:
            if given not in known:
                near = suggestion(given, known) if known else "; the hook has none"
                raise PluginError(f"'{name}' takes an argument '{given}', which the hook does not have{near}{advice}")


def _near(attribute: str) -> str:
    """The hook that was probably meant; not their list, which would bury the sentence."""
    # All begin alike, which would make all of them near.
    by_rest = {name.removeprefix(PREFIX): name for name in HOOK_NAMES}
    close = get_close_matches(attribute.removeprefix(PREFIX), by_rest, n=1)
    return f"did you mean '{by_rest[close[0]]}'?" if close else "docs/hooks.md lists the hooks"
