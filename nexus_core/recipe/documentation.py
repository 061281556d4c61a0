"""docs/recipes.md, written from the schema and the registered strategies, so that it cannot go stale.

python -m nexus_core.recipe.documentation --write docs/recipes.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nexus_core.plugins import Plugins
from nexus_core.recipe.schema import Recipe
from nexus_core.recipe.strategies import CHOICES
from nexus_core.recipe.words import expected, is_by_name, keys_of, kinds_of, section_in
from nexus_core.types import Strategy

INTRODUCTION = """\
# Recipes

<!-- Written by `python -m nexus_core.recipe.documentation --write docs/recipes.md`; change the schema instead. -->

A recipe is a YAML file that says which model, which data, and how each stage works. Everything but `schema`, `model`
and `data` has a default, so a short recipe is a whole one:

```yaml
{example}```

`nexus check RECIPE` says what is wrong with it and what it will do, `nexus run RECIPE` does it. Ready-made recipes lie
in `recipes/`.

**One run, other values.** `--set KEY=VALUE` replaces single values before anything is checked: `--set
train.max_steps=100`, `--set data.domain.0.path=other.jsonl` (entries of a list count from 0), `--set
'train.data={{domain: 0.9, general: 0.1}}'`. VALUE is YAML.

**Mistakes.** Unknown keys, wrong types, values out of range and names that do not exist are errors, told all at once
with file, line, column and the nearest valid name. Nothing is converted: `"512"` in quotes is text, not a number. YAML
itself has traps: it reads `1e-5` as text (write `1.0e-5`), and `on`, `off`, `yes` and `no` as true or false.

**What is reused.** A stage's output is kept under a key made of its own section, the stages before it and the model.
Recipes that differ only in `train` share everything before it; `run` is never part of a key.

**Paths** of models and data are relative to the folder where the command is typed.
"""

EXAMPLE = """\
schema: 1
model: {path: models/my-moe}          # a folder, a Hub id, or embedded:NAME
data:                                 # named sets of text; the names are yours
  domain:                             # each set is a list of sources, mixed by weight
    - path: problems.jsonl            # {"prompt": ..., "response": ...} on every line
    - {path: textbook.txt, weight: 0.5}
  general:
    - path: everyday.txt
select: {strategy: pca, top_k: 24}    # which experts of a layer the new one is built from
convert: {merge: mean, start: zero}   # how; zero: the model begins as exactly its base
train:
  data: {domain: 0.75, general: 0.25} # shares of every batch
  learn: [domain]                     # learn this (language-model loss), keep the rest (KL to the base)
  losses: {lm: 1.0, router_kl: 1.0, logits_kl: 4.0}  # a larger logits_kl forgets less and gains less
  learning_rate: 1.0e-4
  max_steps: 2_000
"""

STRATEGY_KINDS = (
    ("Selection strategies", "`select.strategy`: what a layer's experts are ranked by.", "selection"),
    ("Merge strategies", "`convert.merge`: what the shared expert is made as.", "merge"),
    ("Routing strategies", "`train.routing.strategy`: what of the router learns.", "routing"),
    ("Losses", "Names under `train.losses`, each with its weight.", "losses"),
    ("Data formats", "`format` of a data source; `auto` finds it by the field names.", "data_formats"),
)


def document() -> str:
    """The whole of docs/recipes.md.

    Lists what core itself brings; other installed plugins may add strategies, which `nexus plugins` lists.
    """
    parts = [INTRODUCTION.format(example=EXAMPLE), "## Keys\n"]
    parts += [_section(path, model, description) for path, model, description in _sections(Recipe, "", "")]
    parts.append("## Strategies\n\nParameters stand beside the strategy's name, in the same section.\n")
    plugins = Plugins()
    settable = {choice.kind for choice in CHOICES} | {"losses"}
    for title, where, kind in STRATEGY_KINDS:
        parts.append(_strategies(title, where, list(plugins.strategies(kind).values()), kind in settable))
    return "\n".join(parts)


def _sections(model: type[BaseModel], path: str, description: str) -> Iterator[tuple[str, type[BaseModel], str]]:
    """A section and all below it, in the order of the schema."""
    yield path, model, description
    for key, field in keys_of(model).items():
        inner = section_in(field.annotation)
        if inner is not None:
            name = f"{key}.NAME" if is_by_name(field.annotation) else str(key)
            yield from _sections(inner, f"{path}.{name}" if path else name, field.description or "")


def _section(path: str, model: type[BaseModel], description: str) -> str:
    title = f"### `{path}`" if path else "### Top level"
    lines = [title, ""]
    if path == "train.losses.NAME":
        lines += ["A loss that is more than its weight; beside this key stand its own parameters, below.", ""]
    elif path == "data.NAME":
        lines += [f"{description} Keys of each source:", ""]
    elif description:
        lines += [description, ""]
    return "\n".join(lines + _table(model)) + "\n"


def _table(model: type[BaseModel]) -> list[str]:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in keys_of(model).items():
        value = _cell(_value(model, str(key), field))
        rows.append(f"| `{key}` | {value} | {_default(field)} | {_cell(field.description or '')} |")
    return rows


def _value(model: type[BaseModel], key: str, field: FieldInfo) -> str:
    if any(choice.section is model and choice.key == key for choice in CHOICES):
        return "a strategy, below"
    if section_in(field.annotation) is not None and kinds_of(field.annotation) <= {dict, NoneType}:
        if key == "losses":
            return "a weight or a section by name, below"
        if key == "data":
            return "sets of sources, below"
        return "sections by name, below" if is_by_name(field.annotation) else "a section, below"
    return re.sub(r"'([^']+)'", r"`\1`", expected(field.annotation, field.metadata))


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n")
    shortened = re.sub("e-0([1-9])", r"e-\1", text.strip())
    return f"`{shortened}`"


def _strategies(title: str, where: str, strategies: list[Strategy], has_parameters: bool) -> str:
    lines = [f"### {title}", "", where, "", "| name | what it does |", "|---|---|"]
    lines += [f"| `{strategy.name}` | {_cell(_sentence(strategy.summary))} |" for strategy in strategies]
    for strategy in strategies:
        if has_parameters and strategy.parameters is not None:
            lines += ["", f"Parameters of `{strategy.name}`:", "", *_table(strategy.parameters)]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/recipes.md from the recipe schema.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to; standard output if left out")
    target: Path | None = parser.parse_args().write
    if target is None:
        sys.stdout.write(document())
    else:
        target.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
