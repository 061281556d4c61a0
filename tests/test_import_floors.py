"""Imports point down only; core knows no family; plugins know only core; only tracking knows MLflow.

Read with `ast`, so that imports inside functions count too; those under TYPE_CHECKING do not, they never run.
"""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "nexus_core"
PLUGINS = ROOT / "plugins"

# Parts of nexus_core from the ground up. A part may import what stands on lower lines, and itself.
FLOORS: list[set[str]] = [
    {"types", "errors", "progress"},
    {"processes"},
    {"hookspecs"},
    {"registration"},
    {"plugins", "defaults"},  # plugins registers the defaults
    {"additions", "checkpoint"},
    {"models"},
    {"auto"},
    {"families"},  # what plugins of families that speak plain Hugging Face share
    {"recipe"},
    {"data"},
    {"statistics", "select", "merge", "routing", "distill", "measure", "estimate", "report"},
    {"train"},
    {"stages"},
    {"pipeline"},
    {"contract", "answers", "new_plugin"},  # what plugin authors test, see and start with
    {"contract_plugin"},
    {"track"},
    {"cli"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}

# On these floors parts may also import their neighbours: pure functions that share types.
OPEN_FLOORS = {FLOOR["plugins"], FLOOR["statistics"]}

# The strategies that come with core are registered by import when a hook is called, from wherever they are.
LAZY_UPWARD = {"defaults", "__init__"}

# Words that would mean that core knows a family. deepseek_v3 alone is also the name of a schedule.
FAMILIES = r"gpt.?oss|qwen|mixtral|olmo|granite|llama|deepseek(?!_v3|-V3)|phimoe|glm4|minimax|dots1|ernie"

MLFLOW_PART = "track"

# A plugin to copy, not a part of core.
SKELETON = CORE / "skeleton"


def modules(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    return sorted(path for path in found if not path.is_relative_to(SKELETON))


def part_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Every module that a file imports, its line, and whether that is inside a function."""
    yield from _imports(ast.parse(path.read_text()).body, inside=False)


def _imports(body: list[ast.stmt], *, inside: bool) -> Iterator[tuple[str, int, bool]]:
    for node in body:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this code"
            for name in node.names:
                # `from nexus_core import plugins` imports nexus_core.plugins; a name inside a module does no harm.
                yield f"{node.module}.{name.name}", node.lineno, inside
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse, inside=inside)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                children = getattr(node, field, [])
                if isinstance(children, list):
                    yield from _imports(children, inside=inside or is_function)


@pytest.mark.parametrize("path", modules(CORE), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == "__main__":
        return
    for module, line, is_inside_function in imports(path):
        if not module.startswith("nexus_core."):
            continue
        imported = module.split(".")[1]
        if imported not in FLOOR:  # a name of nexus_core itself, such as __version__ or hookimpl
            continue
        if part in LAZY_UPWARD and (is_inside_function or FLOOR[imported] <= FLOOR["hookspecs"]):
            continue
        allowed = imported == part or FLOOR[imported] < FLOOR[part]
        allowed |= FLOOR[imported] == FLOOR[part] and FLOOR[part] in OPEN_FLOORS
        assert allowed, f"{path.relative_to(ROOT)}:{line}: {part} may not import {imported}"


def test_every_part_has_its_floor() -> None:
    assert {part_of(path) for path in modules(CORE)} - {"__init__", "__main__"} <= set(FLOOR)


def test_the_architecture_page_shows_every_floor_in_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = [
        re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| (?:top|ground)? ?\| (`.+?) \|", page, re.MULTILINE)
    ]
    shown = [part for row in rows for part in row]
    assert sorted(shown) == sorted(FLOOR)
    for above, below in itertools.pairwise(rows):
        assert min(FLOOR[part] for part in above) > max(FLOOR[part] for part in below), (above, below)


def test_only_tracking_imports_mlflow() -> None:
    found = {
        part_of(path) for path in modules(CORE) for module, _, _ in imports(path) if module.split(".")[0] == "mlflow"
    }
    assert found <= {MLFLOW_PART}


def test_core_names_no_family() -> None:
    mentions = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in modules(CORE)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(FAMILIES, line, re.IGNORECASE)
    ]
    assert mentions == []


def test_core_imports_no_plugin_and_plugins_import_only_core() -> None:
    families = {path.name for path in PLUGINS.iterdir() if (path / "__init__.py").is_file()}
    assert families
    for path in [*modules(CORE), *modules(PLUGINS)]:
        own = path.relative_to(PLUGINS).parts[0] if path.is_relative_to(PLUGINS) else None
        for module, line, _ in imports(path):
            top = module.split(".")[0]
            assert top not in families - {own}, f"{path.relative_to(ROOT)}:{line}: imports {module}"


def test_a_plugin_imports_only_what_plugins_are_for() -> None:
    """Stages, pipeline and above are core's own business; a plugin answers hooks."""
    too_high = {part for part, floor in FLOOR.items() if floor >= FLOOR["stages"]}
    for path in modules(PLUGINS):
        for module, line, _ in imports(path):
            if module.startswith("nexus_core."):
                assert module.split(".")[1] not in too_high, f"{path.relative_to(ROOT)}:{line}: imports {module}"


def test_in_tree_plugins_are_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = {module.split(".")[0] for module in project["entry-points"]["nexus.plugins"].values()}
    assert {path.name for path in PLUGINS.iterdir() if (path / "plugin.py").is_file()} == points
