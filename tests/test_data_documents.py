"""Documents of a data set: the split, the mix, the order, and what is left out."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

from nexus_core import hookimpl
from nexus_core.data import documents as module
from nexus_core.data.documents import Documents, documents, is_held_out
from nexus_core.data.passages import Passage
from nexus_core.data.records import check_source
from nexus_core.data.tokenizers import begin_token_id, end_token_id, load_tokenizer
from nexus_core.errors import CheckpointError, DataError, RecipeError
from nexus_core.plugins import installed
from nexus_core.recipe import recipe_from
from nexus_core.recipe.schema import Source
from nexus_core.types import Strategy

TOKENIZER = byte_tokenizer()


def write(path: Path, texts: list[object]) -> str:
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in texts))
    return str(path)


def texts_of(found: Documents) -> list[str]:
    return [TOKENIZER.decode(document.tokens) for document in found]


@pytest.fixture
def numbers(tmp_path):
    return write(tmp_path / "numbers.jsonl", [f"number {number:04d}" for number in range(500)])


def test_parts_are_disjoint_whole_and_about_as_large_as_asked(numbers):
    source = Source(path=numbers, held_out=0.2)
    parts = {part: texts_of(documents([source], part, TOKENIZER)) for part in ("train", "held_out", "all")}
    assert not set(parts["train"]) & set(parts["held_out"])
    assert sorted(parts["train"] + parts["held_out"]) == sorted(parts["all"])
    assert 70 < len(parts["held_out"]) < 130


def test_equal_records_fall_on_the_same_side_in_whatever_order_their_keys_are():
    one, other = {"a": 1, "b": "x"}, {"b": "x", "a": 1}
    for share in (0.1, 0.5, 0.9):
        assert is_held_out(one, share) == is_held_out(other, share)
    assert not is_held_out(one, 0.0)
    assert is_held_out(one, 1.0)


def test_the_same_question_never_lies_on_both_sides(tmp_path):
    rows = [{"id": number, "question": f"What is {number // 5}?", "answer": f"{number}"} for number in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [[{"role": "user", "content": f"What  is {n}?"}, {"role": "assistant", "content": "x"}] for n in range(100)]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    chat = byte_tokenizer(chat_template=CHAT_TEMPLATE)

    def asked(name: str, part: str) -> set[str]:
        found = documents([Source(path=str(tmp_path / name), held_out=0.3)], part, chat)
        return {re.search(r"What +is (\d+)", chat.decode(document.tokens))[1] for document in found}

    for one, other in (("a.jsonl", "a.jsonl"), ("a.jsonl", "b.jsonl")):
        assert not asked(one, "train") & asked(other, "held_out")
        assert asked(one, "train") | asked(other, "held_out") == {str(number) for number in range(100)}


def test_order_is_random_but_the_same_for_the_same_seed(numbers):
    first, again, other = (
        texts_of(documents([Source(path=numbers)], "all", TOKENIZER, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first != sorted(first)
    assert sorted(first) == sorted(other)


def test_what_cannot_be_used_is_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", ["good text", "", "  \n", "x", None, 3, "\ud800 half", "more text"])
    with Path(path).open("a") as file:
        file.write('{"text": "cut')
    found = documents([Source(path=path)], "all", TOKENIZER)
    (report,) = found.report
    assert sorted(texts_of(found)) == ["good text", "more text"]
    assert (report.records, report.documents, report.empty, report.too_short, report.unreadable) == (9, 2, 2, 1, 4)
    assert report.tokens == found.tokens == len("good textmore text")
    assert "a.jsonl" in report.first_problem


def test_what_is_left_out_is_said_once_a_source(tmp_path, caplog):
    rows = [{"prompt": prompt, "response": "yes"} for prompt in ("why?", "", " - ", None, "how?")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        found = documents([Source(path=str(tmp_path / "a.jsonl"))], "all", TOKENIZER)
    assert sorted(texts_of(found)) == ["how?\nyes", "why?\nyes"]
    assert (found.report[0].missing_prompt, found.report[0].unreadable) == (2, 1)
    (record,) = caplog.records
    assert "a.jsonl: of 5 records, left out: 2 without a prompt, 1 unreadable (" in record.getMessage()
    assert "'prompt' is NoneType, not text" in record.getMessage()


def test_text_in_other_fields_than_the_one_that_is_read_is_told(tmp_path, caplog):
    rows = [{"id": "a number", "text": "add two", "code": "def add(a, b): ...", "tests": ["add(1, 2) == 3"]}] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        found = documents([Source(path=str(path))], "all", TOKENIZER)
    assert found.report[0].unread == {"id": 24, "code": 54, "tests": 42}
    assert "a.jsonl: only the field 'text' is read, but code, tests, id hold more text" in caplog.text
    caplog.clear()
    # Said by hand, or less than what is read, as notes on it are: nothing to tell.
    documents([Source(path=str(path), format="text")], "all", TOKENIZER)
    documents([Source(path=str(path), fields={"text": "text"})], "all", TOKENIZER)
    path.write_text(json.dumps({"text": "some long text", "source": "a book"}))
    documents([Source(path=str(path))], "all", TOKENIZER)
    assert not caplog.records


def test_a_record_as_long_as_a_book_is_cut_and_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "LONGEST_PASSAGE_CHARACTERS", 50)
    path = write(tmp_path / "a.jsonl", ["short", "long " * 20])
    with caplog.at_level(logging.WARNING):
        found = documents([Source(path=path)], "all", TOKENIZER)
    assert found.report[0].oversize == 1
    assert "1 records are longer than 50 characters" in caplog.text
    long = max(found, key=len)
    assert (len(long), long.learns.all(), long.learns_end) == (50, True, False)


def test_a_document_begins_as_the_family_wants(tmp_path):
    path = write(tmp_path / "a.jsonl", ["some text"])
    (plain,) = documents([Source(path=path)], "all", TOKENIZER)
    begun = byte_tokenizer()
    begun.bos_token = "<|start|>"
    begun.init_kwargs["add_bos_token"] = True
    assert begin_token_id(begun) == begun.convert_tokens_to_ids("<|start|>")
    (document,) = documents([Source(path=path)], "all", begun)
    assert document.tokens.tolist() == [begin_token_id(begun), *plain.tokens.tolist()]
    assert document.learns.tolist() == [False, *plain.learns.tolist()]
    # a chat template that writes it itself
    begun.chat_template = CHAT_TEMPLATE
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    (document,) = documents([Source(path=str(tmp_path / "b.jsonl"))], "all", begun)
    assert document.tokens.tolist().count(begin_token_id(begun)) == 2  # the user's turn and the assistant's
    begun.init_kwargs["add_bos_token"] = False
    assert begin_token_id(begun) is None


def test_a_tokenizer_that_puts_a_token_first_says_so_itself():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|start|>"
    number = tokenizer.convert_tokens_to_ids("<|start|>")
    assert begin_token_id(tokenizer) is None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", number)]
    )
    assert begin_token_id(tokenizer) == number


def test_a_conversation_with_reasoning_gives_a_document_for_each_answer(tmp_path):
    thinking = CHAT_TEMPLATE.replace(
        "{{ turn['content'] }}", "{% if loop.last %}{{ turn.thinking }}{% endif %}{{ turn['content'] }}"
    )
    turns = [("user", "A", None), ("assistant", "B", "hm"), ("user", "C", None), ("assistant", "D", "so")]
    record = {"messages": [{"role": role, "content": text, "thinking": thought} for role, text, thought in turns]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    found = documents([Source(path=str(tmp_path / "a.jsonl"))], "all", byte_tokenizer(chat_template=thinking))
    assert (found.report[0].records, found.report[0].documents) == (1, 2)


def test_a_plugins_format_is_named_in_a_recipe(tmp_path):
    class Poems:
        @staticmethod
        @hookimpl
        def nexus_data_formats():
            def verses(record, fields, tokenizer):
                return [Passage(verse, ((0, len(verse)),)) for verse in record[fields.get("poem", "poem")]]

            return [Strategy("verses", verses, "one document a verse")]

    (tmp_path / "a.jsonl").write_text(json.dumps({"ode": ["first verse", "second verse"]}))
    settings = {"path": str(tmp_path / "a.jsonl"), "format": "verses", "fields": {"poem": "ode"}}
    recipe = {"schema": 1, "model": {"path": "embedded:tiny-gpt-oss"}, "data": {"poems": [settings]}}
    with pytest.raises(RecipeError, match=r"data.poems.0.format: .*verses"):
        recipe_from(recipe)
    installed().register(Poems(), "poems", "this test")
    try:
        (source,) = recipe_from(recipe).data["poems"]
        assert check_source(source, "here") == "verses"
        found = documents([source], "all", TOKENIZER)
    finally:
        installed().unregister("poems")
    assert sorted(texts_of(found)) == ["first verse", "second verse"]
    assert (found.report[0].records, found.report[0].documents) == (1, 2)


def test_sources_are_mixed_by_weight_of_tokens(tmp_path):
    long = write(tmp_path / "long.jsonl", ["L" * 90 + f"{number:03d}" for number in range(300)])
    short = write(tmp_path / "short.jsonl", ["S" * 7 + f"{number:03d}" for number in range(900)])
    found = documents(
        [Source(path=long, weight=3.0), Source(path=short)], "all", TOKENIZER, limit_tokens=12_000, seed=3
    )
    of_long = sum(len(document) for document in found if document.source == long)
    assert 12_000 <= found.tokens < 12_100
    assert of_long / found.tokens == pytest.approx(0.75, abs=0.01)
    # and so at any point on the way
    half = list(found)[: len(found) // 2]
    half_long = sum(len(document) for document in half if document.source == long)
    assert half_long / sum(map(len, half)) == pytest.approx(0.75, abs=0.02)


def test_a_source_that_runs_out_is_read_again_only_if_asked(tmp_path):
    small = write(tmp_path / "small.jsonl", [f"small {number}" for number in range(3)])
    large = write(tmp_path / "large.jsonl", [f"large {number:03d}" for number in range(100)])
    sources = [Source(path=small), Source(path=large)]
    once = documents(sources, "all", TOKENIZER)
    assert len(once) == len(set(texts_of(once))) == 103
    again = documents(sources, "all", TOKENIZER, repeat=True)
    of_small = sum(len(document) for document in again if document.source == small)
    assert of_small / again.tokens == pytest.approx(0.5, abs=0.01)
    assert again.report[0].passes > 20
    assert again.report[1].documents == 100


def test_candidates_and_tokens_are_both_reached(numbers):
    source = Source(path=numbers)
    assert len(documents([source], "all", TOKENIZER, candidates=50)) == 50
    assert documents([source], "all", TOKENIZER, limit_tokens=1_000).tokens == 1_001
    both = documents([source], "all", TOKENIZER, limit_tokens=1_000, candidates=50)
    assert (len(both), both.tokens) == (91, 1_001)
    assert len(documents([source], "all", TOKENIZER, limit_tokens=10, candidates=50)) == 50


def test_ends_of_pieces_of_running_text_are_not_learnt(tmp_path, numbers):
    (tmp_path / "a.txt").write_text("Some running text.\n\nAnd more.")
    (document,) = documents([Source(path=str(tmp_path / "a.txt"))], "all", TOKENIZER)
    assert not document.learns_end
    assert documents([Source(path=numbers)], "all", TOKENIZER)[0].learns_end


def test_nothing_usable_is_refused_with_the_reason(tmp_path, numbers):
    empty = write(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"empty.jsonl: none of its 2 records can be used: 2 empty"):
        documents([Source(path=empty)], "all", TOKENIZER)
    wrong = write(tmp_path / "wrong.jsonl", [1, 2])
    with pytest.raises(DataError, match=r"wrong.jsonl: none of its 2 .* its field 'text' is int, not text"):
        documents([Source(path=wrong)], "all", TOKENIZER)
    with pytest.raises(DataError, match=r"falls into the part 'held_out' at held_out 0.0; .*change `held_out`"):
        documents([Source(path=numbers, held_out=0.0)], "held_out", TOKENIZER)
    with pytest.raises(DataError, match=r"there is no such file"):
        documents([Source(path=str(tmp_path / "nosuch.jsonl"))], "all", TOKENIZER)


def test_tokenizer_beside_the_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; copy it there"):
        load_tokenizer(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("ü").input_ids == TOKENIZER("ü").input_ids
    # the end of a document, not the end of a turn
    assert end_token_id(loaded) == loaded.convert_tokens_to_ids("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read"):
        load_tokenizer(tmp_path)
