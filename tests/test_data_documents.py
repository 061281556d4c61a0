"""Documents of a data set: the split, the mix, the order, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer

from nexus_core.data.documents import Documents, documents, is_held_out
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.errors import CheckpointError, DataError
from nexus_core.recipe.schema import Source

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
    with pytest.raises(DataError, match=r"empty.jsonl: none of its 2 records can be used: 2 are empty"):
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
