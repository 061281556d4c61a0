"""A YAML file as plain data, with the line and column of every key and value.

Reads YAML 1.1 without its surprises that would go unnoticed: duplicate keys and keys that are not text are problems,
`1:30` is text rather than 90, `010` is text rather than 8, a date is text. `on`, `off`, `yes` and `no` stay what
YAML 1.1 makes of them. Only plain data comes out: tags are problems, and aliases cannot grow beyond MAX_NODES.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from nexus_core.errors import Problem, RecipeError

# Keys and list positions from the top: ("data", "domain", 0, "path").
KeyPath = tuple[str | int, ...]

# A recipe has some hundred nodes. Nested aliases could ask for billions, so reading stops long before that.
MAX_NODES = 50_000

PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}


@dataclass(frozen=True)
class Place:
    """Where one value was given: `file:line:column` of its key and of itself, and a scalar as it was written."""

    key: str
    value: str
    written: str | None = None


@dataclass
class Located:
    """Plain data and the place of everything in it; `problems` are those that reading alone could see."""

    name: str
    value: Any
    places: dict[KeyPath, Place]
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """The place of a value, or of the nearest thing around it that was given."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.name, self.name))

    def at(self, path: KeyPath) -> Any:
        """The value at a path, None where there is none."""
        value = self.value
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value


def dotted(path: KeyPath) -> str:
    """A path as people write it: `data.domain.0.path`."""
    return ".".join(str(part) for part in path)


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows null, true and false, numbers and text only."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (PyYAML's own mechanism)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:true|false|yes|no|on|off)", list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


def read_yaml(text: str, name: str) -> Located:
    """The data of a YAML text.

    name: what stands before `:line:column` in locations. Raises RecipeError if it is not YAML at all; what can be
    read past is in `problems` of the answer.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise RecipeError([_syntax_problem(error, name)]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        message = f"holds the character U+{ord(text[error.position]):04X}, which YAML does not allow; remove it"
        raise RecipeError([Problem(f"{name}:{line}:{column}", "", message)]) from error
    except RecursionError as error:
        raise RecipeError([Problem(name, "", "is nested too deeply for a recipe; see docs/recipes.md")]) from error
    return _Walk(name, loader).read(node)


def _syntax_problem(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    location = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = error.problem or "unknown"
    if "'\\t'" in problem:
        return Problem(location, "", "a tab stands where YAML wants spaces; indent with spaces")
    if "single document" in (error.context or ""):
        return Problem(location, "", "a second YAML document begins here ('---'); a recipe is one document")
    hint = ""
    if "mapping values are not allowed" in problem:
        hint = "; check the indentation, and put a value that holds ': ' in quotes"
    elif "undefined alias" in problem:
        hint = "; put a value that begins with '*' in quotes"
    elif "expected <block end>" in problem or "could not find expected ':'" in problem:
        hint = "; lines of one section begin in the same column and read 'key: value'"
    elif "that cannot start any token" in problem:
        hint = "; put a value that begins with it in quotes"
    elif "expected ',' or" in problem or "end of stream" in problem:
        hint = "; check that brackets, braces and quotes are closed"
    context = f"{error.context}, " if error.context else ""
    return Problem(location, "", f"is not valid YAML: {context}{problem}{hint}")


class _Walk:
    """Turns YAML nodes into data, remembering places."""

    def __init__(self, name: str, loader: _Loader):
        self.name, self.loader = name, loader
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self.nodes = 0

    def read(self, node: yaml.Node | None) -> Located:
        if node is None:
            return Located(self.name, None, {(): Place(self.name, self.name)})
        try:
            value = self._value(node, (), self._location(node))
        except (_TooMuch, RecursionError):
            message = "its aliases (*name) unfold without end or to more than a recipe can hold; write the values out"
            raise RecipeError([Problem(self.name, "", message)]) from None
        return Located(self.name, value, self.places, self.problems)

    def _location(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _value(self, node: yaml.Node, path: KeyPath, key_location: str) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _TooMuch
        location = self._location(node)
        written = node.value if isinstance(node, yaml.ScalarNode) else None
        self.places[path] = Place(key_location, location, written)
        if node.tag not in PLAIN_TAGS:
            self._problem(
                location, path, f"carries the YAML tag {_short(node.tag)}; recipes hold plain values, remove it"
            )
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self._value(item, (*path, index), self._location(item)) for index, item in items]
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):
            self._problem(location, path, f"cannot be read as {_short(node.tag)}: '{node.value[:40]}'")
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            location = self._location(key_node)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != "tag:yaml.org,2002:str":
                shown = f"'{key}' is not read as text" if key else "of this entry is not text"
                self._problem(location, path, f"the key {shown}; put it in quotes")
            elif key == "<<":
                self._problem(location, path, "'<<' (merging) is not part of recipes; write the keys out")
            elif key in found:
                first = self.places[(*path, key)].key
                self._problem(location, (*path, key), f"is given twice, first at {first}; remove one of them")
            else:
                found[key] = self._value(value_node, (*path, key), location)
        return found

    def _problem(self, location: str, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(location, dotted(path), message))


class _TooMuch(Exception):
    pass


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
