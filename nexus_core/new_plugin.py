"""Writes a family plugin to start from: an installable package that works as it is, with the contract as its tests."""

from __future__ import annotations

import re
from pathlib import Path

from nexus_core.errors import UsageError
from nexus_core.plugins import installed

SKELETON = Path(__file__).parent / "skeleton"

# What the skeleton is called in its own files, in every spelling.
PLACEHOLDER = "my_moe"


def write_plugin(name: str, out: Path) -> list[Path]:
    """Write the package `nexus_NAME` with everything around it into the new or empty folder `out`; return its files.

    name: of the family, as its `model_type` in config.json. Raises UsageError if it cannot be a module's name, another
    plugin has it, or the folder holds something.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UsageError(
            f"'{name}' cannot name a plugin: write its model_type in small letters, digits and single '_', e.g. "
            f"'{_as_name(name)}'"
        )
    plugins = installed()
    claimants = [plugin for plugin, claims in plugins.ask_each("nexus_claims", config={"model_type": name}) if claims]
    if claimants or name in plugins.names():
        owner = (claimants or [name])[0]
        raise UsageError(
            f"the model_type '{name}' belongs to the plugin '{owner}' ({plugins.sources[owner]}), and only one may "
            "claim a checkpoint; uninstall it first, or write a plugin for another family"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already; name a new folder with --out")
    written = []
    for source in skeleton_files():
        target = out / _renamed(source.relative_to(SKELETON).as_posix(), name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")
        written.append(target)
    return written


def skeleton_files() -> list[Path]:
    """The files that are copied, in order."""
    kinds = (".md", ".py", ".toml", ".yaml")
    return [path for path in sorted(SKELETON.rglob("*")) if path.suffix in kinds and "__pycache__" not in path.parts]


def class_name(name: str) -> str:
    """my_moe as MyMoe."""
    return "".join(part.capitalize() for part in name.split("_"))


def _renamed(text: str, name: str) -> str:
    for old, new in (
        (PLACEHOLDER, name),
        (PLACEHOLDER.replace("_", "-"), name.replace("_", "-")),
        (class_name(PLACEHOLDER), class_name(name)),
    ):
        text = text.replace(old, new)
    return text


def _as_name(text: str) -> str:
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", text)
    name = "_".join(word.lower() for word in words).lstrip("0123456789_")
    return name or PLACEHOLDER
