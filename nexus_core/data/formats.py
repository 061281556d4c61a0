"""Shapes of a record: which of its fields are read, how they become text, and which part of that text is learnt.

A data format is a Strategy (hook `nexus_data_formats`) whose function takes `(record, fields, tokenizer)` and returns
a `Passage`; `fields` maps the format's roles to field names and may be empty. It raises DataError, without naming the
source, if the record does not fit. Tokens are made afterwards, from many passages at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nexus_core.errors import DataError, suggestion
from nexus_core.types import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Field names that play a role when the recipe does not say: format, role, names in order of preference.
ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "prompt_response": {
        "prompt": ("prompt", "question", "instruction"),
        "response": ("response", "answer", "output", "completion"),
    },
    "text": {"text": ("text", "content")},
}

# Beside an instruction, the material it is about (as in Alpaca's data); joined to the prompt.
INPUT_FIELD = "input"

# Some chat templates write today's date into the system message; the same recipe must give the same tokens tomorrow.
# transformers takes no functions as template variables, but a macro hides the global of its name.
FIXED_DATE = (
    "{%- macro strftime_now(layout) -%}"
    "{{ {'%d %b %Y': '01 Jan 2025', '%B %d, %Y': 'January 01, 2025'}.get(layout, '2025-01-01') }}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class Passage:
    """The text of one record, and the character ranges [start, end) of it that count in losses.

    learns_end: whether the end of the document that follows the text counts too.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]
    learns_end: bool = True


def text(record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast) -> Passage:
    """The field as it is, all of it learnt."""
    content = _string(record, roles("text", record, fields)["text"])
    return Passage(content, ((0, len(content)),))


def prompt_response(
    record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast
) -> Passage:
    """A user's turn and the assistant's in the model's chat template, or on two lines if it has none.

    Only the response is learnt.
    """
    names = roles("prompt_response", record, fields)
    prompt, response = _string(record, names["prompt"]), _string(record, names["response"])
    if names["prompt"] == "instruction" and record.get(INPUT_FIELD):
        prompt = f"{prompt}\n{_string(record, INPUT_FIELD)}"
    if tokenizer.chat_template:
        return _conversation(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenizer
        )
    whole = f"{prompt}\n{response}"
    return Passage(whole, ((len(whole) - len(response), len(whole)),))


def messages(record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast) -> Passage:
    """A conversation in the model's chat template; only the assistant's turns are learnt."""
    turns = record[roles("messages", record, fields)["messages"]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"its messages are {type(turns).__name__} {str(turns)[:40]!r}, not a list of turns")
    for turn in turns:
        if not isinstance(turn, Mapping) or "role" not in turn:
            shape = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
            raise DataError(f"a message has {shape}; it needs role and content")
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template, so messages cannot be written out; give text")
    # Columns of a table hold a null where a turn has no such key; templates test for the key.
    return _conversation(
        [{key: value for key, value in turn.items() if value is not None} for turn in turns], tokenizer
    )


STRATEGIES = [
    Strategy("text", text, "running text in one field: text"),
    Strategy("prompt_response", prompt_response, "two fields: prompt and response, also question and answer"),
    Strategy("messages", messages, "a conversation: messages, each with role and content"),
]


def detect(field_names: Collection[str], fields: Mapping[str, str] | None = None) -> str:
    """The format that records with these fields have. fields: roles the recipe names, which decide if given.

    Raises DataError, naming the fields, if none fits.
    """
    for name, wanted in ROLES.items():
        if fields and set(fields) & set(wanted):
            return name
    if fields:
        known = [role for wanted in ROLES.values() for role in wanted]
        raise DataError(f"`fields` names the role '{next(iter(fields))}'{suggestion(next(iter(fields)), known)}")
    for name, wanted in ROLES.items():
        if all(set(candidates) & set(field_names) for candidates in wanted.values()):
            return name
    raise DataError(
        f"has the fields {', '.join(field_names)}, which fit no format; say which is which, e.g. `fields: {{text: "
        f"{next(iter(field_names), 'FIELD')}}}` or `fields: {{prompt: ..., response: ...}}`"
    )


def roles(format_name: str, field_names: Collection[str], fields: Mapping[str, str]) -> dict[str, str]:
    """The field that plays each role of a built-in format. Raises DataError if one is missing or unknown."""
    wanted = ROLES[format_name]
    for role in fields:
        if role not in wanted:
            raise DataError(f"format '{format_name}' has no role '{role}'{suggestion(role, wanted)}")
    found = {}
    for role, candidates in wanted.items():
        names = (fields[role],) if role in fields else candidates
        present = [name for name in names if name in field_names]
        if not present:
            raise DataError(
                f"has no field '{names[0]}' for the role '{role}' of format '{format_name}'; its fields are "
                f"{', '.join(field_names)}; say which with `fields: {{{role}: FIELD}}`"
            )
        found[role] = present[0]
    return found


def _string(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"its field '{name}' is {type(value).__name__}, not text")
    return value


def _conversation(turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Passage:
    """The turns as the template writes them; an assistant's turn is what follows its rendered prefix.

    Templates that write a turn otherwise once others follow it (as when they drop earlier reasoning) still give the
    right ranges, as long as everything before the turn stays as it was.
    """
    whole = _render(turns, tokenizer)
    learnt = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(turns[:number], tokenizer, add_generation_prompt=True)
        if not whole.startswith(before):
            raise DataError("the chat template writes earlier turns otherwise once an answer follows")
        end = (
            len(whole) if number == len(turns) - 1 else _end_of_turn(whole, len(before), turns[: number + 1], tokenizer)
        )
        learnt.append((len(before), max(end, len(before))))
    # The template writes its own end of turn, which is learnt; what separates documents is not part of it.
    return Passage(whole, tuple(learnt), learns_end=False)


def _render(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        template = FIXED_DATE + tokenizer.get_chat_template()
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"the chat template refuses it: {error}") from error


def _end_of_turn(whole: str, start: int, turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> int:
    """Where the last of `turns` ends in the whole conversation, which goes on after it."""
    end = _common(whole, _render(turns, tokenizer))
    content = turns[-1].get("content")
    # Its reasoning may be gone from the whole, and then the two part ways at once; what it said is still there.
    found = whole.find(content, start) if isinstance(content, str) else -1
    return max(end, found + len(content)) if found >= 0 and isinstance(content, str) else end


def _common(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))
