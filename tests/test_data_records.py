"""Records of real files of every kind, and what is said when a source cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexus_core.data.files import cut_text
from nexus_core.data.records import check_source, load_records
from nexus_core.errors import DataError
from nexus_core.recipe.schema import Source

RECORDS = [{"text": "one"}, {"text": "two ü"}, {"text": "three"}]


def records_of(path: Path, **settings: object) -> list[dict]:
    return list(load_records(Source(path=str(path), **settings)))


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_jsonl(tmp_path):
    assert records_of(write_lines(tmp_path / "a.jsonl", RECORDS)) == RECORDS


@pytest.mark.parametrize(
    "content", [json.dumps(RECORDS), json.dumps({"version": 1, "data": RECORDS}), "\n".join(map(json.dumps, RECORDS))]
)
def test_json_as_a_list_or_wrapped_in_an_object_or_as_lines(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert records_of(tmp_path / "a.json") == RECORDS


def test_parquet(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert records_of(tmp_path / "a.parquet") == RECORDS


def test_saved_folder_and_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "plain")
    DatasetDict({"test": Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "split")
    assert records_of(tmp_path / "plain") == RECORDS
    assert records_of(tmp_path / "split", split="test") == RECORDS
    with pytest.raises(DataError, match="no split 'tets'; did you mean 'test'"):
        records_of(tmp_path / "split", split="tets")


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_of_both_layouts(tmp_path, kind):
    from pyarrow import Table, ipc

    table = Table.from_pylist(RECORDS)
    create = ipc.new_file if kind == "file" else ipc.new_stream
    with create(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert records_of(tmp_path / "a.arrow") == RECORDS
    (tmp_path / "b.arrow").write_bytes(b"ARROW1 but no more")
    with pytest.raises(DataError, match=r"b.arrow: is not a whole arrow file"):
        records_of(tmp_path / "b.arrow")


def test_files_rows_and_shards_come_in_an_order_that_the_seed_decides(tmp_path, monkeypatch):
    import datasets

    rows = [{"text": f"{number}"} for number in range(20)]
    for number, row in enumerate(rows):
        write_lines(tmp_path / "hub" / f"part-{number:02d}.jsonl", [row])
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    real = datasets.load_dataset
    asked = []

    def load_dataset(path, config, *, revision, **settings):
        asked.append((path, config, revision, settings["streaming"]))
        return real("json", data_files=str(tmp_path / "hub" / "*.jsonl"), **settings)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    places = {"folder": str(tmp_path / "hub"), "saved": str(tmp_path / "saved"), "hub": "someone/something"}
    for name, place in places.items():
        stream = load_records(Source(path=place, config="main", revision="v1"))
        assert list(stream) == rows, name
        one, again, other = (list(stream.in_order(seed)) for seed in (1, 1, 2))
        assert one == again != other, name
        assert one != rows, name
        assert sorted(one, key=lambda row: int(row["text"])) == rows, name
        first = load_records(Source(path=place, config="main", revision="v1", max_records=3))
        assert list(first.in_order(1)) == rows[:3], name
    assert set(asked) == {("someone/something", "main", "v1", True)}
    assert not list((tmp_path / "saved").glob("cache*"))


def test_bytes_that_are_not_utf8_cost_their_own_record_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "three"}\n')
    stream = load_records(Source(path=str(tmp_path / "a.jsonl")))
    assert list(stream) == [RECORDS[0], RECORDS[2]]
    assert (stream.damaged, "a.jsonl:2: is not UTF-8 text (byte 13 of the line)" in stream.first_damage) == (1, True)
    paragraphs = [b"good text " * 150, b"caf\xe9 " * 150, b"more text " * 150]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(paragraphs))
    stream = load_records(Source(path=str(tmp_path / "a.txt")))
    assert [record["text"][:4] for record in stream] == ["good", "more"]
    assert stream.damaged == 1
    assert "a.txt: is not UTF-8 text (byte 0xe9 after 'caf'); save it as UTF-8" in stream.first_damage


def test_folder_of_files_is_read_in_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", RECORDS[1:])
    write_lines(tmp_path / "a.jsonl", RECORDS[:1])
    assert records_of(tmp_path) == RECORDS
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(DataError, match="mixes text files with files of records"):
        records_of(tmp_path)


def test_max_records(tmp_path):
    assert records_of(write_lines(tmp_path / "a.jsonl", RECORDS), max_records=2) == RECORDS[:2]


def test_text_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {number}. " + "word " * (20 * (number % 7)) for number in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    stream = load_records(Source(path=str(tmp_path / "a.txt")))
    pieces = [record["text"] for record in stream]
    assert stream.pieces_of_text
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert all(len(piece) <= 2_000 for piece in pieces)
    assert len(pieces) < 15


def test_pieces_of_text_are_as_long_as_asked_for(tmp_path):
    paragraphs = [f"Paragraph {number}: " + "word " * 30 for number in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    for place in (tmp_path / "a.txt", tmp_path):
        fine, coarse = (records_of(place, piece_characters=characters) for characters in (250, 10_000))
        assert [record["text"] for record in fine] == paragraphs
        assert len(coarse) == 1


def test_text_without_paragraphs_is_cut_between_lines_and_without_lines_anywhere():
    assert list(cut_text(["aaaa\n", "bbbb\n", "cc\n"], 10)) == ["aaaa\nbbbb", "cc"]
    assert list(cut_text(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(cut_text(["\n", " \n", "\n"], 10)) == []


def test_a_damaged_line_is_counted_and_the_rest_is_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    path.write_text(path.read_text() + '{"text": "cut of\n[1, 2]\n')
    stream = load_records(Source(path=str(path)))
    assert list(stream) == RECORDS
    assert stream.damaged == 2
    assert f"{path}:4: is not JSON" in stream.first_damage


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"plain text\n", r"a.jsonl:1: is not JSON .* one JSON object per line"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: is a JSON array, not an object"),
        ("a.json", b'{"text": ', r"a.json:1:10: is not JSON"),
        ("a.json", b"3", r"a.json: is a JSON number; give a list"),
        ("a.parquet", b"PAR1 but no more", r"a.parquet: is not a whole parquet file"),
        ("a.txt", b"\xff\xfe\x00", r"a.txt: is not UTF-8 text"),
        ("a.dat", b"ab\0cd", r"a.dat: holds zero bytes"),
        ("a.csv", b"a,b\n1,2\n", r"a.csv: files ending in .csv are not read; convert it to jsonl or parquet"),
        ("a.jsonl", b"\n", r"a.jsonl: holds no records"),
    ],
)
def test_unusable_files_are_one_clear_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_source(Source(path=str(tmp_path / name)), "recipe.yaml:3")


@pytest.mark.parametrize("path", ["nosuch.jsonl", "data/nosuch.jsonl", "./some/where", "/no/such/folder", "a/b/c"])
def test_missing_files_are_said_to_be_missing(path):
    with pytest.raises(DataError, match=r"there is no such file or folder .*; give jsonl, json"):
        load_records(Source(path=path))


def test_hub_data_that_cannot_be_had_is_a_data_error():
    with pytest.raises(DataError, match=r"'someone/something' \(split train\).*check name"):
        list(load_records(Source(path="someone/something")))


def test_embedded_data_is_found_by_name():
    with pytest.raises(DataError, match=r"no plugin brings an embedded data set of that name"):
        load_records(Source(path="embedded:nosuch"))


def test_check_source_names_place_path_fields_and_remedy(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "solution": "s"}])
    with pytest.raises(DataError, match=r"recipe.yaml:3: .*a.jsonl: has the fields question, solution, which fit no"):
        check_source(Source(path=str(path)), "recipe.yaml:3")
    source = Source(path=str(path), fields={"prompt": "question", "response": "solution"})
    assert check_source(source, "recipe.yaml:3") == "prompt_response"
    with pytest.raises(DataError, match=r"format 'txet' is not known; did you mean 'text'"):
        check_source(Source(path=str(path), format="txet"), "here")
    with pytest.raises(DataError, match=r"no field 'answers' for the role 'response'.*fields are question, solution"):
        check_source(Source(path=str(path), fields={"prompt": "question", "response": "answers"}), "here")
    with pytest.raises(DataError, match=r"no role 'respones'; did you mean 'response'"):
        check_source(Source(path=str(path), fields={"prompt": "question", "respones": "solution"}), "here")
