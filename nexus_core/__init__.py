"""NEXUS: one always-on shared expert per layer for a pretrained mixture-of-experts model.

Importing this package is quick; `load` and `as_teacher` bring torch and transformers when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nexus_core.errors import NexusError
from nexus_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from nexus_core.additions import as_teacher
    from nexus_core.models import load

__version__ = "0.1.0"
__all__ = ["NexusError", "__version__", "as_teacher", "hookimpl", "load"]

_LAZY = {"as_teacher": "nexus_core.additions", "load": "nexus_core.models"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nexus_core' has no attribute '{name}'")
