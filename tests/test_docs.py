"""The hand-written documentation says what the code does: hooks, commands, files, recipe keys."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from nexus_core import hookspecs
from nexus_core.cli import COMMANDS
from nexus_core.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
HOOKS_PAGE = ROOT / "docs" / "hooks.md"

ARGUMENTS = {
    name: list(inspect.signature(function).parameters)
    for name, function in vars(hookspecs).items()
    if name.startswith("nexus_")
}

HEADING = re.compile(r"^### `(nexus_\w+)\((.*)\)`$", re.MULTILINE)


def hook_sections() -> dict[str, tuple[list[str], str]]:
    """Name to documented arguments and text, in the order of the page."""
    page = HOOKS_PAGE.read_text()
    found = list(HEADING.finditer(page))
    ends = [match.start() for match in found[1:]] + [len(page)]
    return {
        match[1]: (re.findall(r"\w+", match[2]), page[match.end() : end])
        for match, end in zip(found, ends, strict=True)
    }


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_hook_is_documented_in_the_order_of_hookspecs() -> None:
    assert list(hook_sections()) == list(ARGUMENTS)


@pytest.mark.parametrize("hook", ARGUMENTS)
def test_every_argument_of_a_hook_is_explained(hook: str) -> None:
    heading, text = hook_sections()[hook]
    assert heading == ARGUMENTS[hook]
    prose = _without_code(text)
    assert [name for name in ARGUMENTS[hook] if f"`{name}`" not in prose] == []


def test_examples_of_hooks_parse_and_take_only_arguments_that_the_hook_has() -> None:
    shown = set()
    for block in python_blocks(HOOKS_PAGE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("nexus_"):
                shown.add(node.name)
                assert {argument.arg for argument in node.args.args} <= set(ARGUMENTS[node.name]), node.name
    assert shown == set(ARGUMENTS)


def test_the_whole_plugin_works_as_printed() -> None:
    import numpy as np

    from nexus_core.plugins import Plugins
    from nexus_core.select.ranking import LayerStatistics

    whole = next(block for block in python_blocks(HOOKS_PAGE) if "nexus_least_used.py" in block)
    module = type(hookspecs)("nexus_least_used")
    exec(whole, vars(module))
    plugins = Plugins()
    plugins.register(module, "least_used", "docs/hooks.md")
    counts = np.array([3, 1, 2])
    layer = LayerStatistics(0, 6, counts / 6, np.eye(3), counts, counts / 6)
    ranking = plugins.strategies("selection")["least_used"].function(layer, None, np.random.default_rng(0))
    assert ranking.importance.argmax() == 1


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    spans = re.findall(r"`nexus ([^`]*)`", text)
    spans += re.findall(r"^(?:\$ )?(?:\S*bin/)?nexus (.*)$", text, re.MULTILINE)
    named = {span.split()[0] for span in spans if span.split() and re.fullmatch(r"[a-z_]+", span.split()[0])}
    assert named <= set(COMMANDS)


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> set[str]:
    """Every dotted key that a recipe may have, as far as the schema alone says."""
    keys = set()
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        keys.add(key)
        for inner in _models_in(field.annotation):
            keys |= recipe_keys(inner, f"{key}.")
    return keys


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [model for argument in arguments for model in _models_in(argument)]


# `model.config` and the like are Python, and the names under `data` are the user's.
SECTIONS = sorted(name for name in recipe_keys() if "." not in name and name not in ("schema", "model", "data"))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_recipe_key_that_is_named_exists(page: Path) -> None:
    keys = recipe_keys()
    # Below these the keys are the user's own, or a strategy's.
    own = ("train.data.", "train.losses.", "collect.data.")
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)(?:=[^`]*|: [^`]*)?`", page.read_text())
    files = (".json", ".jsonl", ".md", ".py", ".png", ".yaml")
    assert [key for key in named if key not in keys and not key.startswith(own) and not key.endswith(files)] == []
