"""Prompts as a model is given them, and what it wrote as a source of data: the very tokens."""

from __future__ import annotations

from typing import Any

import pytest
from byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from prompt_files import write_records

from nexus_core.data.documents import documents
from nexus_core.data.generated import record_of
from nexus_core.data.prompts import read_prompts
from nexus_core.errors import DataError
from nexus_core.recipe.schema import Records, Source

CHAT = byte_tokenizer(chat_template=CHAT_TEMPLATE)


def said(prompts: list[Any], tokenizer: Any = CHAT) -> list[str]:
    return [tokenizer.decode(prompt.tokens) for prompt in prompts]


def test_prompts_are_given_up_to_where_the_answer_begins(tmp_path) -> None:
    user, answer = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
    path = write_records(
        tmp_path / "chats.jsonl",
        [{"messages": turns} for turns in ([user], [user, answer], [user, answer, user], [answer], [])],
    )
    prompts, (report,) = read_prompts([Records(path=path)], CHAT, 200)
    opened = "<|start|>user<|message|>a?<|end|><|start|>assistant<|message|>"
    longer = f"{opened}b<|end|>{opened}"
    assert said(prompts) == [opened, opened, longer]
    assert [prompt.asked for prompt in prompts] == [["a?"]] * 3
    assert (report.records, report.documents, report.missing_prompt, report.unreadable) == (5, 3, 1, 1)


def test_prompts_need_no_response_and_may_have_one(tmp_path) -> None:
    rows = [{"question": "a?", "answer": "b"}, {"question": " ", "answer": "b"}, {"question": "c?", "answer": "d"}]
    path = write_records(tmp_path / "rows.jsonl", rows)
    prompts, (report,) = read_prompts([Records(path=path)], byte_tokenizer(), 200)
    assert said(prompts) == ["a?\n", "c?\n"]
    assert report.missing_prompt == 1


def test_long_prompts_are_left_out_and_long_text_is_begun(tmp_path) -> None:
    asking = write_records(tmp_path / "asking.jsonl", [{"prompt": "a" * 200}, {"prompt": "b"}])
    text = write_records(tmp_path / "text.jsonl", [{"text": "c" * 200}])
    prompts, (one, other) = read_prompts([Records(path=asking), Records(path=text)], CHAT, 100)
    assert said(prompts)[1:] == ["c" * 100]
    assert [prompt.continues_text for prompt in prompts] == [False, True]
    assert (one.too_long, one.documents, other.oversize, other.documents) == (1, 1, 1, 1)


def test_sources_without_prompts_are_refused(tmp_path) -> None:
    for rows, problem in (
        ([{"prompt": "-"}], "none of its 1 records is a prompt: 1 without a prompt"),
        ([{"body": "a"}], "has the fields body, which fit no format"),
        ([{"prompt_tokens": [1], "completion_tokens": [2]}], "which fit no format"),
    ):
        with pytest.raises(DataError, match=problem):
            read_prompts([Records(path=write_records(tmp_path / "rows.jsonl", rows))], CHAT, 100)
    path = write_records(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match="prompts cannot be read in the format 'generated'"):
        read_prompts([Records(path=path, format="generated")], CHAT, 100)


def tokens(text: str) -> list[int]:
    return CHAT(text, add_special_tokens=False)["input_ids"]


def test_the_very_tokens_come_back_and_the_completion_is_learnt(tmp_path) -> None:
    # Bytes that are no text and letters that another tokenization would join: only ids say which they were.
    prompt, completion = tokens("<|start|>user<|message|>a<|end|><|start|>assistant<|message|>"), tokens("b<|return|>")
    odd = [*tokens("x")[:1], 128, 255, *completion]
    rows = [
        record_of(["a"], prompt, completion, CHAT, ended=True, continues_text=False),
        record_of(["b"], prompt, odd, CHAT, ended=True, continues_text=False),
        record_of(["c"], tokens("run"), tokens("ning<|endoftext|>"), CHAT, ended=True, continues_text=True),
        record_of(["d"], tokens("run"), tokens("nin"), CHAT, ended=False, continues_text=True),
    ]
    found = documents([Source(path=write_records(tmp_path / "x.jsonl", rows))], "all", CHAT)
    assert found.report[0].format == "generated"
    by_tokens = {tuple(document.tokens.tolist()): document for document in found}
    assert len(by_tokens) == 4
    for wanted in (completion, odd):
        chat = by_tokens[*prompt, *wanted]
        assert chat.learns.tolist() == [False] * len(prompt) + [True] * len(wanted)
        assert not chat.learns_end  # the mark that the model ended with is learnt instead
    assert by_tokens[tuple(tokens("running"))].learns.all()
    assert by_tokens[tuple(tokens("running"))].learns_end
    assert by_tokens[tuple(tokens("runnin"))].learns.all()
    assert not by_tokens[tuple(tokens("runnin"))].learns_end


def test_tokens_of_another_tokenizer_are_left_out(tmp_path) -> None:
    row = record_of(["a"], tokens("a"), tokens("b"), CHAT, ended=False, continues_text=False)
    good, moved, unknown, no_ids = row, row | {"completion_tokens": tokens("c")}, row | {"prompt_tokens": [10**7]}, {}
    no_ids = row | {"completion_tokens": "b"}
    found = documents([Source(path=write_records(tmp_path / "x.jsonl", [good, moved, unknown, no_ids]))], "all", CHAT)
    assert (found.report[0].documents, found.report[0].unreadable) == (1, 3)
    assert "another model's tokenizer" in found.report[0].first_problem


def test_a_question_and_what_the_base_writes_to_it_lie_on_the_same_side(tmp_path) -> None:
    asked = write_records(tmp_path / "asked.jsonl", [{"prompt": f"q {n}?", "response": "r"} for n in range(200)])
    prompts, _ = read_prompts([Records(path=asked)], CHAT, 100)
    rows = [record_of(p.asked, p.tokens, tokens("b"), CHAT, ended=False, continues_text=False) for p in prompts]
    written = write_records(tmp_path / "written.jsonl", rows)

    def sides(path: str) -> set[str]:
        found = documents([Source(path=path, held_out=0.4)], "held_out", CHAT)
        return {CHAT.decode(document.tokens).split("<|message|>")[1] for document in found}

    assert sides(asked) == sides(written)
    assert 50 < len(sides(asked)) < 110
