"""Conversations in templates that rewrite what was said, as those of reasoning models do: what is learnt, and where."""

from __future__ import annotations

import json
from typing import Any

import pytest
from byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

from nexus_core.data.conversations import question
from nexus_core.data.formats import conversations, messages
from nexus_core.data.passages import MissingPromptError, Passage
from nexus_core.errors import DataError

# Channels as in Harmony: reasoning stands in the last answer only, and behind a tool call until a final answer follows.
CHANNELS = """\
{%- for message in messages %}
{%- if message.role == "assistant" %}
{%- set later = messages[loop.index:] | rejectattr("tool_calls", "defined") %}
{%- set later = later | selectattr("role", "equalto", "assistant") | list %}
{%- if message.thinking and (loop.last or (message.tool_calls and not later)) %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
{%- endif %}
{%- if message.tool_calls %}
{{- "<|start|>assistant to=" + message.tool_calls[0].function.name + "<|message|>" }}
{{- message.tool_calls[0].function.arguments | tojson + "<|call|>" }}
{%- else %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
{{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
{%- endif %}
{%- elif message.role in ("user", "tool") or loop.first %}
{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
{%- if loop.first and tools %}{{ "(" + tools | map(attribute="function.name") | join(", ") + ")" }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}"""
TOKENIZER = byte_tokenizer(chat_template=CHANNELS)
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|call|>"]})


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content, "tool_calls": None, "thinking": None}


def answer(content: str | None, thinking: str | None = None, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "thinking": thinking, **rest}


def call(thinking: str | None = None, arguments: Any = '{"x": 1}') -> dict[str, Any]:
    return answer(None, thinking, tool_calls=[{"id": None, "function": {"name": "f", "arguments": arguments}}])


def written(passages: list[Passage]) -> list[str]:
    """Each passage's text with what is learnt in brackets."""
    shown = []
    for passage in passages:
        text = passage.text
        for start, end in reversed(passage.learnt):
            text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
        shown.append(text)
    return shown


def chat(*turns: dict[str, Any], **rest: Any) -> list[str]:
    return written(messages({"messages": list(turns), **rest}, {}, TOKENIZER))


def test_answers_without_reasoning_are_learnt_in_one_passage():
    assert chat(user("A"), answer("B"), user("C"), answer("D")) == [
        "<|start|>user<|message|>A<|end|><|start|>assistant[<|channel|>final<|message|>B]<|end|>"
        "<|start|>user<|message|>C<|end|><|start|>assistant[<|channel|>final<|message|>D<|return|>]"
    ]


def test_an_answer_whose_reasoning_is_dropped_later_has_a_passage_of_its_own():
    reasoning = "<|channel|>analysis<|message|>{}<|end|>"
    thought = "<|start|>assistant[" + reasoning + "<|start|>assistant<|channel|>final<|message|>{}<|return|>]"
    assert chat(user("A"), answer("B", "hm"), user("C"), answer("D", "so")) == [
        "<|start|>user<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B<|end|>"
        "<|start|>user<|message|>C<|end|>" + thought.format("so", "D"),
        "<|start|>user<|message|>A<|end|>" + thought.format("hm", "B"),
    ]


def test_reasoning_behind_a_tool_call_is_there_when_the_answer_is_written():
    # The template drops it once the final answer stands; the model still saw it when it wrote that answer.
    assert chat(user("A"), call("hm"), {"role": "tool", "content": "3"}, answer("B")) == [
        "<|start|>user<|message|>A<|end|><|start|>assistant[<|channel|>analysis<|message|>hm<|end|>"
        '<|start|>assistant to=f<|message|>{"x": 1}<|call|>]<|start|>tool<|message|>3<|end|>'
        "<|start|>assistant[<|channel|>final<|message|>B<|return|>]"
    ]


def test_a_generation_prompt_that_begins_the_answer_is_not_learnt():
    prompt = "<|start|>assistant<|message|>"
    template = CHAT_TEMPLATE.replace(prompt + "{% endif %}", prompt + "(think) {% endif %}")
    tokenizer = byte_tokenizer(chat_template=template)
    plain = {"messages": [user("A"), answer("B")]}
    assert written(messages(plain, {}, tokenizer))[0].endswith("<|start|>assistant<|message|>[B<|return|>]")
    thought = {"messages": [user("A"), answer("(think) B")]}
    assert written(messages(thought, {}, tokenizer))[0].endswith("<|start|>assistant<|message|>(think) [B<|return|>]")


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_reasoning_is_found_under_every_name_in_use(name):
    (shown,) = chat(user("A"), {"role": "assistant", "content": "B", name: "hm"})
    assert "analysis<|message|>hm<|end|>" in shown


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1, "y": None}])
def test_arguments_of_a_tool_call_are_an_object_however_they_are_given(arguments):
    (shown,) = chat(user("A"), call(arguments=arguments))
    assert '[ to=f<|message|>{"x": 1}<|call|>]' in shown


@pytest.mark.parametrize("tools", [[{"name": "f"}], [{"type": "function", "function": {"name": "f", "x": None}}]])
def test_definitions_of_tools_stand_beside_the_messages(tools):
    for given in (tools, json.dumps(tools)):
        assert "<|end|>(f)" in chat(user("A"), answer("B"), tools=given)[0]
    assert "(f)" not in chat(user("A"), answer("B"), tools="")[0]


def test_conversations_as_they_are_shared():
    record = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "A"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "B"},
        ],
    }
    same = {
        "messages": [
            {"role": "system", "content": "S"},
            user("A"),
            call(),
            {"role": "tool", "content": "3"},
            answer("B"),
        ]
    }
    assert conversations(record, {}, TOKENIZER) == messages(same, {}, TOKENIZER)
    roles = {"conversation": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}
    assert written(conversations(roles, {}, TOKENIZER)) == chat(user("A"), answer("B"))


def test_what_nobody_asked_for_is_not_learnt():
    (shown,) = chat(answer("Hello!"), user("A"), answer("B"), user("C"))
    assert shown.count("[") == 1
    assert shown.endswith("[<|channel|>final<|message|>B<|return|>]")
    assert "[" not in chat(user("A"), answer(""))[0]


@pytest.mark.parametrize("prompt", ["", " - ", None])
def test_answers_to_a_prompt_that_was_taken_out_are_left_out(prompt):
    with pytest.raises(MissingPromptError):
        chat(user("A"), answer("B"), {"role": "user", "content": prompt}, answer("D"))
    assert chat({"role": "system", "content": "-"}, user("A"), answer("B")) == chat(user("A"), answer("B"))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([user("A"), {"role": "system", "content": "lost"}, answer("B")], r"leaves out turn 2 \(system\)"),
        (
            [user("A"), answer(None, tool_calls=[{"name": name, "arguments": {}} for name in "fg"])],
            "only one of the 2 tool calls",
        ),
        ([user("A"), call(arguments="{")], "arguments of the tool call 'f' are not JSON"),
        ([user("A"), answer(None, tool_calls=[{"function": {"id": 1}}])], "a tool call has id; it needs name"),
        ([user("A"), answer([{"type": "image"}])], "a part of type 'image'; only text"),
        ([user("A"), answer(3)], "content of a turn is int, not text"),
    ],
)
def test_what_a_template_would_lose_is_said(turns, message):
    with pytest.raises(DataError, match=message):
        chat(*turns)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "humna", "value": "x"}, "a turn is from 'humna'; did you mean 'human'"),
        ({"from": "human"}, "a turn has from; it needs from and value"),
        ({"from": "function_call", "value": "f(1)"}, "from 'function_call' is not JSON"),
    ],
)
def test_turns_of_another_shape_are_named(turn, message):
    with pytest.raises(DataError, match=message):
        conversations({"conversations": [turn]}, {}, TOKENIZER)


def test_content_in_parts_is_joined():
    assert chat(user("A"), answer([{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]))[0].endswith(
        "BC<|return|>]"
    )


def test_a_question_is_what_the_model_is_given_before_it_answers():
    tools = [{"name": "f", "parameters": {}}]
    asked = "<|start|>user<|message|>A<|end|>(f)"
    called = (
        '<|start|>assistant<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=f<|message|>{"x": 1}<|call|>'
    )
    result = {"role": "tool", "content": "1"}
    assert question([user("A")], TOKENIZER, tools) == f"{asked}<|start|>assistant"
    assert question([user("A"), answer("B", "hm")], TOKENIZER, tools) == f"{asked}<|start|>assistant"
    # Behind a tool's result the model goes on with what it thought.
    after = f"{asked}{called}<|start|>tool<|message|>1<|end|><|start|>assistant"
    assert question([user("A"), call("hm"), result], TOKENIZER, tools) == after
    assert question([user("A"), call("hm"), result, answer("B")], TOKENIZER, tools) == after


@pytest.mark.parametrize("turns", [[], [answer("B")], [{"role": "system", "content": "S"}, answer("B")], [user(" ")]])
def test_what_asks_nothing_is_no_question(turns):
    with pytest.raises(MissingPromptError):
        question(turns, TOKENIZER)
