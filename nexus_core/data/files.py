"""The records of one local file as dicts, one at a time; a damaged record does not end the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nexus_core.errors import DataError

TEXT_SUFFIXES = (".md", ".rst", ".text", ".txt")
RECORD_SUFFIXES = (".arrow", ".json", ".jsonl", ".ndjson", ".parquet")
KINDS = (
    "jsonl, json, parquet, arrow, text, a folder of these, a folder that `datasets` saved, a Hub id, or 'embedded:NAME'"
)

# Tables and archives would otherwise pass for text or fail with an error about bytes.
UNREADABLE_SUFFIXES = (
    ".7z",
    ".bz2",
    ".csv",
    ".gz",
    ".npz",
    ".safetensors",
    ".tar",
    ".tsv",
    ".xz",
    ".zip",
    ".zst",
)

# What a reader yields: a record, or why this one could not be read (the others still can).
Read = dict[str, Any] | DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def cut_text(lines: Iterable[str], characters: int) -> Iterator[str]:
    """Running text in pieces of at most `characters`, cut between paragraphs, else between lines, else anywhere."""
    piece, paragraph_end = "", 0
    for line in lines:
        for start in range(0, len(line), characters):
            part = line[start : start + characters]
            while piece and len(piece) + len(part) > characters:
                end = paragraph_end or len(piece)
                yield from _unless_blank(piece[:end])
                piece, paragraph_end = piece[end:], 0
            piece += part
            if not part.strip():
                paragraph_end = len(piece)
    yield from _unless_blank(piece)


def _unless_blank(piece: str) -> Iterator[str]:
    if piece.strip():
        yield piece.strip("\n")


def is_text(path: Path) -> bool:
    """Whether a file is read as running text: whatever has no ending of a file of records."""
    return path.suffix not in RECORD_SUFFIXES


def read_file(path: Path, piece_characters: int) -> Iterator[Read]:
    """The records of one file, by its ending. Raises DataError if its kind is not read, or it is damaged as a whole.

    piece_characters: a text file has no records of its own, so whole paragraphs up to this many characters make one.
    """
    if path.suffix in UNREADABLE_SUFFIXES:
        raise DataError(f"{path}: files ending in {path.suffix} are not read; convert it to jsonl or parquet")

    def text(path: Path) -> Iterator[Read]:
        return _text(path, piece_characters)

    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet, ".arrow": _arrow}
    try:
        yield from readers.get(path.suffix, text)(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); give {KINDS}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path) -> Iterator[Read]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if content.isspace():
                continue
            try:
                yield _record(json.loads(content.decode()), f"{path}:{number}")
            except UnicodeDecodeError as error:
                yield DataError(f"{path}:{number}: is not UTF-8 text (byte {error.start} of the line); give {KINDS}")
            except ValueError as error:
                yield DataError(f"{path}:{number}: is not JSON ({error}); a jsonl file has one JSON object per line")


def _json(path: Path) -> Iterator[Read]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{path}:{error.lineno}:{error.colno}: is not JSON: {error.msg}") from error
        # Many files called .json are JSON lines.
        yield from _jsonl(path)
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: is {_json_kind(content)}; give a list of objects, or jsonl")
    for number, item in enumerate(content):
        yield _record(item, f"{path}: item {number}")


def _record(item: Any, where: str) -> Read:
    if isinstance(item, dict):
        return item
    return DataError(f'{where}: is {_json_kind(item)}, not an object such as {{"text": ...}}')


def _json_kind(value: Any) -> str:
    """What JSON calls a value that is no object."""
    if value is None or isinstance(value, bool):
        return f"JSON {json.dumps(value)}"
    return f"a JSON {'string' if isinstance(value, str) else 'array' if isinstance(value, list) else 'number'}"


def _parquet(path: Path) -> Iterator[Read]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a whole parquet file ({error}); copy or download it again") from error


def _arrow(path: Path) -> Iterator[Read]:
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                table = ipc.open_file(file)
                batches: Iterable[Any] = (table.get_batch(number) for number in range(table.num_record_batches))
            except pyarrow.ArrowInvalid:  # of Arrow's two layouts, that of a stream, which `datasets` writes
                file.seek(0)
                batches = ipc.open_stream(file)
            for batch in batches:
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a whole arrow file ({error}); copy or download it again") from error


def _text(path: Path, piece_characters: int) -> Iterator[Read]:
    # Bytes that are not UTF-8 become lone surrogates, by which the pieces they are in are known.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for piece in cut_text(file, piece_characters):
            try:
                piece.encode()
            except UnicodeEncodeError as error:
                byte = ord(piece[error.start]) - 0xDC00
                before = piece[: error.start][-20:]
                yield DataError(
                    f"{path}: is not UTF-8 text (byte {byte:#04x}{f' after {before!r}' if before else ''}); save it as "
                    "UTF-8"
                )
                continue
            if "\0" in piece:
                raise DataError(f"{path}: holds zero bytes, so it is not text; give {KINDS}")
            yield {"text": piece}
