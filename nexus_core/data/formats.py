"""Shapes of a record: which of its fields are read, how they become text, and which part of that text is learnt.

A data format is a Strategy (hook `nexus_data_formats`) whose function takes `(record, fields, tokenizer)` and returns
a `Passage`, or what is `Written` in tokens already, or a list of them; `fields` maps the format's roles to field names
and may be empty. It raises DataError, without naming the source, if the record does not fit. Tokens are made
afterwards, from many passages at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from nexus_core.data.conversations import PLACEHOLDERS, Turn, conversation
from nexus_core.data.generated import COMPLETION, PROMPT, asked_by, generated
from nexus_core.data.passages import MissingPromptError, Passage
from nexus_core.errors import DataError, suggestion
from nexus_core.types import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "ASKING",
    "ROLES",
    "STRATEGIES",
    "MissingPromptError",
    "Passage",
    "asking_turns",
    "detect",
    "opening",
    "roles",
]

# Field names that play a role when the recipe does not say: format, role, names in order of preference.
Roles = Mapping[str, Mapping[str, tuple[str, ...]]]
ROLES: Roles = {
    "generated": {PROMPT: (PROMPT,), COMPLETION: (COMPLETION,)},
    "messages": {"messages": ("messages",)},
    "conversations": {"conversations": ("conversations", "conversation")},
    "prompt_response": {
        "prompt": ("prompt", "question", "instruction"),
        "response": ("response", "answer", "output", "completion"),
    },
    "text": {"text": ("text", "content")},
}

# The same where a model is to write what follows: no response is needed.
ASKING: Roles = {
    "messages": ROLES["messages"],
    "conversations": ROLES["conversations"],
    "prompt_response": {"prompt": ROLES["prompt_response"]["prompt"]},
    "text": ROLES["text"],
}

# Roles that a record may lack.
_CHAT_ROLES = {"system": ("system", "system_prompt"), "tools": ("tools",)}
OPTIONAL_ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": _CHAT_ROLES,
    "conversations": _CHAT_ROLES,
    "prompt_response": {"system": _CHAT_ROLES["system"]},
}

# Beside an instruction, the material it is about (as in Alpaca's data); joined to the prompt.
INPUT_FIELD = "input"

# Who speaks in conversations as ShareGPT's users shared them, in the words of chat templates.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
TOOL_CALL_SPEAKER = "function_call"


def text(record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast) -> Passage:
    """The field as it is, all of it learnt."""
    content = _string(record, roles("text", record, fields)["text"])
    return Passage(content, ((0, len(content)),))


def prompt_response(
    record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast
) -> Passage | list[Passage]:
    """A user's turn and the assistant's in the model's chat template, or on two lines if it has none.

    Only the response is learnt. An empty prompt is a MissingPromptError: a response to nothing is not one.
    """
    names = roles("prompt_response", record, fields)
    prompt, response = _prompt(record, names), _string(record, names["response"])
    if prompt.strip() in PLACEHOLDERS:
        raise MissingPromptError(
            f"its prompt is empty; for text that answers nothing give `fields: {{text: {names['response']}}}`"
        )
    system = _system(record, names)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return conversation([*system, *turns], tokenizer)
    before = "".join(f"{turn['content']}\n" for turn in system) + f"{prompt}\n"
    return Passage(before + response, ((len(before), len(before + response)),))


def messages(record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast) -> list[Passage]:
    """A conversation in the model's chat template; only the assistant's turns are learnt."""
    names = roles("messages", record, fields)
    turns = _turns(record, names, "messages")
    return conversation([*_system(record, names), *turns], tokenizer, _tools(record, names))


def conversations(
    record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast
) -> list[Passage]:
    """The same, of turns with `from` and `value` instead of role and content."""
    names = roles("conversations", record, fields)
    turns = _turns(record, names, "conversations")
    return conversation([*_system(record, names), *turns], tokenizer, _tools(record, names))


STRATEGIES = [
    Strategy("text", text, "running text in one field: text"),
    Strategy("prompt_response", prompt_response, "two fields: prompt and response, also question and answer"),
    Strategy("messages", messages, "a conversation: messages, each with role and content; tools beside it"),
    Strategy("conversations", conversations, "a conversation: turns with from (human, gpt, ...) and value"),
    Strategy("generated", generated, f"tokens that a model was given and wrote: {PROMPT}, {COMPLETION}"),
]


def detect(field_names: Collection[str], fields: Mapping[str, str] | None = None, formats: Roles = ROLES) -> str:
    """The format that records with these fields have. fields: roles the recipe names, which decide if given.

    formats: those to choose from, with the roles that each needs. Raises DataError, naming the fields, if none fits.
    """
    for name, wanted in formats.items():
        if fields and set(fields) & set(wanted):
            return name
    known = {role for wanted in (*formats.values(), *OPTIONAL_ROLES.values()) for role in wanted}
    unknown = next((role for role in fields or {} if role not in known), None)
    if unknown:
        raise DataError(f"`fields` names the role '{unknown}'{suggestion(unknown, known)}")
    for name, wanted in formats.items():
        if all(set(candidates) & set(field_names) for candidates in wanted.values()):
            return name
    raise DataError(
        f"has the fields {', '.join(field_names)}, which fit no format; say which is which, e.g. `fields: {{text: "
        f"{next(iter(field_names), 'FIELD')}}}` or `fields: {{prompt: ..., response: ...}}`"
    )


def roles(
    format_name: str, field_names: Collection[str], fields: Mapping[str, str], formats: Roles = ROLES
) -> dict[str, str]:
    """The field that plays each role of a built-in format; optional ones only if they are there.

    formats: the roles that each needs. Raises DataError if one is missing or unknown.
    """
    wanted, optional = formats[format_name], OPTIONAL_ROLES.get(format_name, {})
    for role in fields:
        if role not in wanted and role not in optional:
            raise DataError(f"format '{format_name}' has no role '{role}'{suggestion(role, {*wanted, *optional})}")
    found = {}
    for role, candidates in {**wanted, **optional}.items():
        names = (fields[role],) if role in fields else candidates
        present = [name for name in names if name in field_names]
        if present:
            found[role] = present[0]
        elif role in wanted or role in fields:
            raise DataError(
                f"has no field '{names[0]}' for the role '{role}' of format '{format_name}'; its fields are "
                f"{', '.join(field_names)}; say which with `fields: {{{role}: FIELD}}`"
            )
    return found


def opening(format_name: str, record: Mapping[str, Any], fields: Mapping[str, str], formats: Roles = ROLES) -> Any:
    """What a record asks, or says if it asks nothing: by its hash the record is for training or held out.

    So the same question with other answers, in another format, or beside another number never lies on both sides.
    A record that does not fit its format, or of a plugin's format, is taken as a whole.
    """
    if format_name == "generated":
        return asked_by(record)
    try:
        if format_name == "text":
            asked = [_string(record, roles("text", record, fields)["text"])]
        elif format_name == "prompt_response":
            names = roles("prompt_response", record, fields, formats)
            asked = [turn["content"] for turn in _system(record, names)] + [_prompt(record, names)]
        elif format_name in ROLES:
            names = roles(format_name, record, fields)
            asked = []
            for turn in [*_system(record, names), *_turns(record, names, format_name)]:
                if turn["role"] == "assistant":
                    break
                asked.append(str(turn.get("content")))
        else:
            return record
    except DataError:
        return record
    words = [" ".join(part.split()) for part in asked]
    return words if any(words) else record


def asking_turns(format_name: str, record: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[list[Turn], Any]:
    """The turns of a record that a model is to answer, and its tools.

    format_name: one of `ASKING` that has turns. Raises MissingPromptError for an empty prompt, DataError if the record
    does not fit.
    """
    names = roles(format_name, record, fields, ASKING)
    if format_name != "prompt_response":
        return [*_system(record, names), *_turns(record, names, format_name)], _tools(record, names)
    prompt = _prompt(record, names)
    if prompt.strip() in PLACEHOLDERS:
        raise MissingPromptError("its prompt is empty")
    return [*_system(record, names), {"role": "user", "content": prompt}], None


def _string(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"its field '{name}' is {type(value).__name__}, not text")
    return value


def _prompt(record: Mapping[str, Any], names: Mapping[str, str]) -> str:
    prompt = _string(record, names["prompt"])
    if names["prompt"] == "instruction" and record.get(INPUT_FIELD):
        return f"{prompt}\n{_string(record, INPUT_FIELD)}"
    return prompt


def _system(record: Mapping[str, Any], names: Mapping[str, str]) -> list[Turn]:
    if "system" not in names or record[names["system"]] is None:
        return []
    content = _string(record, names["system"])
    return [] if content.strip() in PLACEHOLDERS else [{"role": "system", "content": content}]


def _tools(record: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    return record[names["tools"]] if "tools" in names else None


def _turns(record: Mapping[str, Any], names: Mapping[str, str], format_name: str) -> list[Turn]:
    turns = record[names[format_name]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"its {format_name} are {type(turns).__name__} {str(turns)[:40]!r}, not a list of turns")
    return [_message(turn) if format_name == "messages" else _shared_turn(turn) for turn in turns]


def _message(turn: Any) -> Turn:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        shape = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise DataError(f"a message has {shape}; it needs role and content (from and value: `format: conversations`)")
    return dict(turn)


def _shared_turn(turn: Any) -> Turn:
    if isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
        turn = {"from": turn["role"], "value": turn.get("content")}
    if not isinstance(turn, Mapping) or "from" not in turn or not isinstance(turn.get("value"), str):
        shape = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise DataError(f"a turn has {shape}; it needs from and value, which is text")
    speaker = str(turn["from"])
    if speaker not in SPEAKERS:
        raise DataError(f"a turn is from '{speaker}'{suggestion(speaker, SPEAKERS)}")
    if speaker != TOOL_CALL_SPEAKER:
        return {"role": SPEAKERS[speaker], "content": turn["value"]}
    try:
        calls = json.loads(turn["value"])
    except ValueError as error:
        raise DataError(f"a turn from '{speaker}' is not JSON ({error})") from error
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
