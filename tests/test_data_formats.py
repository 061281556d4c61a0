"""Records to text, and which characters of it are learnt."""

from __future__ import annotations

import numpy as np
import pytest
from byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

from nexus_core.data.formats import STRATEGIES, Passage, detect, messages, opening, prompt_response, text
from nexus_core.data.learnt_tokens import learnt_tokens
from nexus_core.errors import DataError

PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(chat_template=CHAT_TEMPLATE)


def learnt_text(passage: Passage) -> list[str]:
    return [passage.text[start:end] for start, end in passage.learnt]


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (["text", "meta"], {}, "text"),
        (["question", "answer"], {}, "prompt_response"),
        (["instruction", "input", "output"], {}, "prompt_response"),
        (["messages", "text"], {}, "messages"),
        (["text", "code"], {}, "text"),
        (["text", "code"], {"prompt": "text", "response": "code"}, "prompt_response"),
        (["body"], {"text": "body"}, "text"),
        (["id", "conversations"], {}, "conversations"),
        (["chat", "functions"], {"conversations": "chat", "tools": "functions"}, "conversations"),
        (["chat"], {"messages": "chat"}, "messages"),
    ],
)
def test_format_goes_by_field_names(names, fields, expected):
    assert detect(names, fields) == expected


def test_unknown_fields_and_roles_are_refused():
    with pytest.raises(DataError, match=r"has the fields a, b, which fit no format; .*`fields: \{text: a\}`"):
        detect(["a", "b"])
    with pytest.raises(DataError, match="names the role 'promt'; did you mean 'prompt'"):
        detect(["a"], {"promt": "a"})


def test_text_is_learnt_whole():
    assert text({"text": "a b"}, {}, PLAIN) == Passage("a b", ((0, 3),))


def test_response_alone_is_learnt():
    passage = prompt_response({"question": "1+1?", "answer": "2"}, {}, PLAIN)
    assert passage.text == "1+1?\n2"
    assert learnt_text(passage) == ["2"]
    assert passage.learns_end


def test_alpacas_input_belongs_to_the_prompt():
    passage = prompt_response({"instruction": "Add.", "input": "1 1", "output": "2"}, {}, PLAIN)
    assert passage.text == "Add.\n1 1\n2"


def test_prompt_and_response_in_the_chat_template():
    (passage,) = prompt_response({"prompt": "Hi", "response": "Ho"}, {}, CHAT)
    assert passage.text == "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Ho<|return|>"
    assert learnt_text(passage) == ["Ho<|return|>"]
    assert not passage.learns_end


def test_every_answer_is_learnt_but_not_the_mark_that_only_earlier_ones_end_with():
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"), ("user", "E")]
    record = {"messages": [{"role": role, "content": content, "name": None} for role, content in turns]}
    (passage,) = messages(record, {}, CHAT)
    encoded = CHAT(passage.text, add_special_tokens=False, return_offsets_mapping=True)
    learns = learnt_tokens(passage, np.array(encoded["offset_mapping"]))
    learnt = CHAT.decode(np.array(encoded["input_ids"])[learns])
    # Asked for B, the model must write <|return|>; that it is <|end|> once the conversation has gone on is no example.
    assert learnt == "BD<|return|>"
    assert passage.text.endswith("<|return|>")


def test_todays_date_never_gets_into_the_tokens():
    dated = byte_tokenizer(chat_template="{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE)
    (passage,) = prompt_response({"prompt": "Hi", "response": "Ho"}, {}, dated)
    assert passage.text.startswith("2025-01-01<|start|>")


@pytest.mark.parametrize(
    ("function", "record", "tokenizer", "message"),
    [
        (text, {"text": None}, PLAIN, "its field 'text' is NoneType, not text"),
        (text, {"body": "x"}, PLAIN, "has no field 'text'"),
        (messages, {"messages": []}, CHAT, "not a list of turns"),
        (
            messages,
            {"messages": [{"from": "x", "value": "y"}]},
            CHAT,
            r"a message has from, value; it needs role and content .*`format: conversations`",
        ),
        (messages, {"messages": [{"role": "user", "content": "x"}]}, PLAIN, "has no chat template"),
    ],
)
def test_records_that_do_not_fit(function, record, tokenizer, message):
    with pytest.raises(DataError, match=message):
        function(record, {}, tokenizer)


def test_tokens_that_touch_a_learnt_range_are_learnt_even_if_white_space_is_trimmed_off_offsets():
    passage = Passage("ab\ncd\nef", ((3, 6),))
    #                  ab      \n      cd      \n      ef
    full = np.array([[0, 2], [2, 3], [3, 5], [5, 6], [6, 8]])
    trimmed = np.array([[0, 2], [3, 3], [3, 5], [6, 6], [6, 8]])
    assert learnt_tokens(passage, full).tolist() == [False, False, True, True, False]
    assert learnt_tokens(passage, trimmed).tolist() == [False, False, True, True, False]


def test_optional_roles_are_taken_where_they_are():
    record = {"system_prompt": "S", "prompt": "Hi", "response": "Ho"}
    assert prompt_response(record, {}, PLAIN).text == "S\nHi\nHo"
    assert prompt_response({**record, "system_prompt": "-"}, {}, PLAIN).text == "Hi\nHo"
    (passage,) = prompt_response(record, {}, CHAT)
    assert passage.text.startswith("<|start|>system<|message|>S<|end|><|start|>user<|message|>Hi")


def test_the_split_goes_by_what_is_asked():
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a  b"},
        {"role": "assistant", "content": "x"},
    ]
    assert opening("messages", {"id": 1, "messages": turns}, {}) == ["S", "a b"]
    shared = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "x"}]
    question = opening("prompt_response", {"question": "a b", "answer": "x", "id": 3}, {})
    assert opening("conversations", {"conversations": shared}, {}) == question == ["a b"]
    # nothing is asked, or the format is not known: the record as a whole
    assert opening("text", {"text": " "}, {}) == {"text": " "}
    assert opening("of_a_plugin", {"text": "a"}, {}) == {"text": "a"}
    assert opening("messages", {"messages": 3}, {}) == {"messages": 3}


def test_strategies_are_the_formats():
    names = ["text", "prompt_response", "messages", "conversations", "generated"]
    assert [strategy.name for strategy in STRATEGIES] == names
