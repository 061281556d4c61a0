"""Conversations in a model's own chat template, and which characters of them are the model's own.

A template is written for talking, not for training: it may drop an earlier answer's reasoning, end the last turn
otherwise than the others, or leave out what it does not know. So every answer is looked at as the model would have
written it: after the template's generation prompt over all that came before it. Where that stands unchanged in the
conversation as a whole, it is learnt there; where it doesn't, the answer is learnt in a passage of its own that ends
with it. Nothing is learnt that the model would not be asked to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nexus_core.data.passages import MissingPromptError, Passage
from nexus_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turn = dict[str, Any]

# What public sets put where a prompt was taken out, for example because its licence forbids to pass it on.
PLACEHOLDERS = ("", "-")

# Names that templates and data sets give to what the assistant thought before it answered.
REASONING_KEYS = ("thinking", "reasoning_content", "reasoning")

# Some chat templates write today's date into the system message; the same recipe must give the same tokens tomorrow.
# transformers takes no functions as template variables, but a macro hides the global of its name.
FIXED_DATE = (
    "{%- macro strftime_now(layout) -%}"
    "{{ {'%d %b %Y': '01 Jan 2025', '%B %d, %Y': 'January 01, 2025'}.get(layout, '2025-01-01') }}"
    "{%- endmacro -%}"
)

# Stands for an answer whose own words do not matter.
_ANY_ANSWER = "Any answer."


def conversation(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerFast, tools: Any = None) -> list[Passage]:
    """The turns as the model's template writes them, with every answer learnt exactly once.

    turns: with role, content, tool_calls and reasoning as transformers names them. tools: definitions of functions, or
    JSON text of them. One passage, unless the template rewrites earlier answers. Raises DataError if there is no
    template, it refuses the turns or leaves one of them out, and MissingPromptError if a user's turn is a placeholder.
    """
    turns = _completed(turns)
    writer = _Writer(tokenizer, read_tools(tools))
    # What nothing precedes is a greeting, not an answer.
    answers = [number for number, turn in enumerate(turns) if number and _is_answer(turn)]
    if not answers:
        return [Passage(writer.write(turns), (), learns_end=False)]
    writer.refuse_if_it_leaves_out(turns[: answers[-1] + 1])
    passages = []
    while answers:
        whole = "".join(writer.answer(turns, answers[-1]))
        found = {number: span for number in answers if (span := _span(writer, whole, turns, number, answers[-1]))}
        # The template writes its own end of turn, which is learnt; what separates documents is not part of it.
        passages.append(Passage(whole, tuple(found[number] for number in sorted(found)), learns_end=False))
        answers = [number for number in answers if number not in found]
    return passages


def question(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerFast, tools: Any = None) -> str:
    """What the model is given when it is to write the next turn, or the last one if that is an answer.

    Raises as `conversation`, and MissingPromptError if nothing comes before the answer.
    """
    turns = _completed(turns)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or all(turn["role"] in ("system", "developer") for turn in turns):
        raise MissingPromptError("nothing comes before the answer")
    writer = _Writer(tokenizer, read_tools(tools))
    writer.refuse_if_it_leaves_out(turns)
    return writer.write(turns, generation_prompt=True)


def _completed(turns: Sequence[Turn]) -> list[Turn]:
    """The turns as templates expect them. Raises MissingPromptError if a user's is a placeholder."""
    completed = [complete(turn) for turn in turns]
    completed = [turn for turn in completed if turn["role"] != "system" or turn["content"].strip() not in PLACEHOLDERS]
    if any(turn["role"] == "user" and turn["content"].strip() in PLACEHOLDERS for turn in completed):
        raise MissingPromptError("a user's turn is empty, so its answer answers nothing")
    return completed


def complete(turn: Mapping[str, Any]) -> Turn:
    """A turn as templates expect it: no nulls (columns of a table hold them where a turn has no such key), arguments of
    tool calls as objects, reasoning under every name in use, content as text.
    """
    made = {key: without_nulls(value) for key, value in turn.items() if value is not None and value != []}
    content = made.get("content")
    if isinstance(content, list):
        made["content"] = "".join(_part(part) for part in content)
    elif content is not None and not isinstance(content, str):
        raise DataError(f"the content of a turn is {type(content).__name__}, not text")
    if "tool_calls" in made:
        made["tool_calls"] = [_tool_call(call) for call in made["tool_calls"]]
    if "content" not in made and "tool_calls" not in made:
        made["content"] = ""
    reasoning = next((made[key] for key in REASONING_KEYS if made.get(key)), None)
    for key in REASONING_KEYS:
        made.pop(key, None)
        if reasoning is not None:
            made[key] = reasoning
    return made


def without_nulls(value: Any) -> Any:
    """Plain data with every key left out whose value is null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Definitions of functions as templates expect them, from a list of them or its JSON text; None if there are none.

    Raises DataError for anything else.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() not in PLACEHOLDERS else None
        except ValueError as error:
            raise DataError(f"its tools are text that is not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"its tools are {type(tools).__name__} {str(tools)[:40]!r}, not a list of definitions")
    plain = [without_nulls(tool) for tool in tools]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in plain]


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"a turn holds a part of type '{kind}'; only text can be read")


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"a tool call is {type(call).__name__}, not an object with name and arguments")
    function = dict(call.get("function", call))
    if not isinstance(function.get("name"), str):
        raise DataError(f"a tool call has {', '.join(function)}; it needs name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI's interface gives JSON text, which a template would put in quotes once more.
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(f"the arguments of the tool call '{function['name']}' are not JSON ({error})") from error
    else:
        function["arguments"] = arguments
    return (
        {**call, "type": "function", "function": function}
        if "function" in call
        else {"type": "function", "function": function}
    )


def _is_answer(turn: Turn) -> bool:
    return turn["role"] == "assistant" and bool(
        turn.get("content", "").strip() or turn.get("tool_calls") or turn.get(REASONING_KEYS[0])
    )


def _span(writer: _Writer, whole: str, turns: list[Turn], number: int, last: int) -> tuple[int, int] | None:
    """Where an answer stands in the conversation up to the answer `last`; None if not as the model would write it."""
    before, reply = writer.answer(turns, number)
    if number == last:
        return len(before), len(whole)
    if not whole.startswith(before):
        return None
    alone = before + reply
    same = writer.unbroken(whole, _common(whole, alone))
    # Only the mark that ends the turn may differ: that of the last turn tells to stop talking. It is not learnt here.
    if same < len(before) or not writer.is_mark(alone[same:]):
        return None
    return len(before), same


class _Writer:
    """A chat template with its tools: what it writes, and what of it an answer is."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tools: list[Any] | None):
        if not tokenizer.chat_template:
            raise DataError("the model's tokenizer has no chat template, so messages cannot be written out; give text")
        self._tokenizer, self._tools = tokenizer, tools
        marks = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._longest_mark = max(map(len, marks), default=0)
        self._answers: dict[int, tuple[str, str]] = {}

    def write(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        """The turns as one text. Raises DataError if the template refuses them."""
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns),
                    tools=self._tools,
                    chat_template=FIXED_DATE + self._tokenizer.get_chat_template(tools=self._tools),
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template refuses it: {error}") from error

    def answer(self, turns: list[Turn], number: int) -> tuple[str, str]:
        """What the model is given when it is to write turn `number`, and what it then writes."""
        if number not in self._answers:
            self._answers[number] = self._answer(turns[:number], turns[number])
        return self._answers[number]

    def _answer(self, earlier: list[Turn], turn: Turn) -> tuple[str, str]:
        whole = self.write([*earlier, turn])
        asked = self.write(earlier, generation_prompt=True)
        if whole.startswith(asked):
            return asked, whole[len(asked) :]
        bare = self.write(earlier)
        if whole.startswith(bare):
            # The generation prompt also begins the answer, as with an opened block of reasoning.
            start = max(len(bare), self.unbroken(whole, _common(whole, asked)))
            return whole[:start], whole[start:]
        # The template writes earlier turns otherwise now that the answer is there, as when it drops the reasoning
        # behind a tool call. The model was given them as they were; where its answer begins shows beside another one.
        prompt = asked[len(bare) :] if asked.startswith(bare) else ""
        other = self.write([*earlier, {"role": "assistant", "content": _ANY_ANSWER}])
        start = whole.rfind(prompt, 0, _common(whole, other)) if prompt else -1
        if start < 0:
            raise DataError("the chat template writes earlier turns otherwise once an answer follows")
        return asked, whole[start + len(prompt) :]

    def unbroken(self, text: str, place: int) -> int:
        """The place, or the beginning of the mark (such as `<|end|>`) that it lies inside of."""
        if self._marks:
            for found in self._marks.finditer(text, max(place - self._longest_mark, 0), place + self._longest_mark):
                if found.start() < place < found.end():
                    return found.start()
        return place

    def is_mark(self, text: str) -> bool:
        """Whether there is nothing but marks and white space in it."""
        return not (self._marks.sub("", text) if self._marks else text).strip()

    def refuse_if_it_leaves_out(self, turns: list[Turn]) -> None:
        """Raises DataError if a turn that nobody wrote with a tool, or a tool call, is missing in what is written."""
        whole = self.write(turns)
        for number, turn in enumerate(turns):
            content = turn.get("content", "").strip()
            if turn["role"] in ("system", "developer", "user") and content not in whole:
                raise DataError(f"the chat template leaves out turn {number + 1} ({turn['role']})")
            calls = turn.get("tool_calls", [])
            if len(calls) > 1:
                first = [*turns[:number], {**turn, "tool_calls": calls[:1]}]
                if self.write(first) == self.write(turns[: number + 1]):
                    raise DataError(f"the chat template writes only one of the {len(calls)} tool calls of a turn")


def _common(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
