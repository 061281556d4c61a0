"""What a recipe's key may hold and what it was given, in words: for error messages and for docs/recipes.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nexus_core.recipe.located import KeyPath, Place

# What YAML 1.1 takes for text although it means a number: no point, or no sign in the exponent.
EXPONENT_TEXT = re.compile(r"([-+]?)([0-9]+)(?:\.([0-9]*))?[eE]([-+]?)([0-9]+)")
GROUPED_TEXT = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")


def expected(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a value of this type must be, e.g. "a whole number of at least 1 or 'auto'"."""
    annotation, limits = _unwrap(annotation, metadata)
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return _either(expected(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return _either(f"'{value}'" if isinstance(value, str) else str(value) for value in arguments)
    if origin is list:
        return "a list of names" if arguments[0] is str else f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is dict:
        return f"a mapping of names to {_plural(arguments[1])}"
    if annotation is bool:
        return "true or false"
    if annotation is int:
        return "a whole number" + _range(limits)
    if annotation is float:
        return "a number" + _range(limits)
    if annotation is str:
        return "text that is not empty" if limits.get("min_length") else "text"
    if _is_model(annotation):
        keys = keys_of(annotation)
        if len(keys) == 1:
            key, field = next(iter(keys.items()))
            return f"{{{key}: {expected(field.annotation, field.metadata)}}}"
        return f"a section with keys {_some_keys(annotation)}"
    return str(getattr(annotation, "__name__", annotation))


def given(value: Any) -> str:
    """What was found instead, e.g. "the text 'abc'"."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    return str(value)


def remedy(value: Any, annotation: Any, place: Place) -> str:
    """What to write instead, from `; ` on, where the mistake can be guessed; else nothing."""
    kinds = kinds_of(annotation)
    if value is None:
        return "; write a value, or remove the key"
    if isinstance(value, str):
        choices = [choice for choice in kinds if isinstance(choice, str)]
        close = get_close_matches(value, choices, n=1, cutoff=0.6)
        if close:
            return f"; did you mean '{close[0]}'?"
        if kinds & {int, float}:
            return _number_remedy(value, float in kinds)
        if bool in kinds and value.lower() in ("true", "yes", "on", "false", "no", "off"):
            return f"; write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'} without quotes"
        section = section_in(annotation)
        if section is not None:
            item = f"{{{next(iter(keys_of(section)))}: {value}}}"
            return f"; write {f'[{item}]' if list in kinds else item}"
        return "; write it as a list: " + f"[{value}]" if list in kinds else ""
    if isinstance(value, bool) and str in kinds:
        return f"; YAML reads {place.written} as {str(value).lower()}, put it in quotes"
    if isinstance(value, int | float) and str in kinds and not isinstance(value, bool):
        return "; put it in quotes"
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, list) and dict in kinds and list not in kinds:
        return "; write 'key: value' lines without dashes"
    if not isinstance(value, list) and list in kinds and kinds.isdisjoint({int, float, bool, str}):
        return "; begin each item with '- ', or write [...]"
    return ""


def _number_remedy(text: str, takes_fractions: bool) -> str:
    match = EXPONENT_TEXT.fullmatch(text)
    if match and (not takes_fractions) and float(text).is_integer() and abs(float(text)) < 1e15:
        return f"; YAML takes {text} for text, write {int(float(text)):_}"
    if match:
        sign, whole, fraction, exponent_sign, exponent = match.groups()
        number = f"{sign}{whole}.{fraction or '0'}e{exponent_sign or '+'}{exponent}"
        return f"; YAML takes {text} for text, write {number}"
    if GROUPED_TEXT.fullmatch(text):
        return f"; write {text.replace(',', '_')}"
    if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", text):
        return f"; write {text.lstrip('0') or '0'} without quotes or leading zeros"
    return ""


def field_at(model: Any, path: KeyPath) -> tuple[Any, tuple[Any, ...]]:
    """Type and limits of the value at a path below a model; (Any, ()) where the model says nothing."""
    annotation, metadata = model, ()
    for part in path:
        annotation, metadata = _step(annotation, part)
    return annotation, metadata


def _step(annotation: Any, part: str | int) -> tuple[Any, tuple[Any, ...]]:
    annotation, _ = _unwrap(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for argument in arguments:
            found = _step(argument, part)
            if found[0] is not Any:
                return found
    if _is_model(annotation) and part in keys_of(annotation):
        field = keys_of(annotation)[part]
        return field.annotation, tuple(field.metadata)
    if origin is dict:
        return arguments[1], ()
    if origin is list or (origin is tuple and isinstance(part, int) and part < len(arguments)):
        return arguments[0 if origin is list else int(part)], ()
    return Any, ()


def keys_of(model: type[BaseModel]) -> dict[str | int, FieldInfo]:
    """The fields of a section by the key that recipes use."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def kinds_of(annotation: Any) -> set[Any]:
    """The plain types and literal values that a type admits: {int, "auto"}; sections count as dict."""
    annotation, _ = _unwrap(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return set().union(*(kinds_of(argument) for argument in arguments))
    if origin is Literal:
        return set(arguments) | {type(value) for value in arguments if not isinstance(value, str)}
    if origin in (list, tuple):
        return {list}
    if origin is dict or _is_model(annotation):
        return {dict}
    return {annotation}


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a type holds, directly or in a list, mapping or union; None if it holds none."""
    annotation, _ = _unwrap(annotation)
    if _is_model(annotation):
        return annotation
    return next((found for argument in get_args(annotation) if (found := section_in(argument))), None)


def is_by_name(annotation: Any) -> bool:
    """Whether a type is a mapping whose names are the user's, or those of strategies."""
    return get_origin(_unwrap(annotation)[0]) is dict


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _unwrap(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[Any, dict[str, Any]]:
    """The type without Annotated, and its limits by name."""
    notes = list(metadata)
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        notes += more
    limits: dict[str, Any] = {}
    for note in notes:
        for part in note.metadata if isinstance(note, FieldInfo) else [note]:
            for name in ("gt", "ge", "lt", "le", "min_length"):
                if getattr(part, name, None) is not None:
                    limits[name] = getattr(part, name)
    return annotation, limits


def _range(limits: dict[str, Any]) -> str:
    low = limits.get("ge", limits.get("gt"))
    high = limits.get("le", limits.get("lt"))
    if low is None and high is None:
        return ""
    if high is None:
        return f" of at least {low}" if "ge" in limits else f" above {low}"
    if low is None:
        return f" of at most {high}" if "le" in limits else f" below {high}"
    start = f" from {low}" if "ge" in limits else f" above {low}"
    return f"{start} to {high}" if "le" in limits else f"{start} to below {high}"


def _plural(annotation: Any) -> str:
    annotation, limits = _unwrap(annotation)
    if _is_model(annotation):
        return f"sections with keys {_some_keys(annotation)}"
    words = {int: "whole numbers", float: "numbers", str: "text", bool: "true or false"}
    if annotation in words:
        return words[annotation] + _range(limits)
    inner = get_args(annotation)
    return f"lists of {_plural(inner[0])}" if get_origin(annotation) is list else expected(annotation)


def _some_keys(model: type[BaseModel]) -> str:
    keys = [str(key) for key in keys_of(model)]
    return ", ".join(keys) if len(keys) <= 4 else f"{', '.join(keys[:3])} and so on"


def _either(choices: Iterable[str]) -> str:
    *first, last = dict.fromkeys(choices)
    return f"{', '.join(first)} or {last}" if first else last
