"""The records of a data source as dicts, one at a time, whatever the source is stored as.

Local files are streamed; nothing is copied into a cache. Saved folders and Hub data sets go through the `datasets`
library, Hub ones in its streaming mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nexus_core.data import formats
from nexus_core.errors import DataError, suggestion
from nexus_core.plugins import installed
from nexus_core.recipe.schema import Source

EMBEDDED = "embedded:"

# A text file has no records of its own: whole paragraphs up to this many characters make one.
TEXT_RECORD_CHARACTERS = 2_000

TEXT_SUFFIXES = (".md", ".rst", ".text", ".txt")
KINDS = "jsonl, json, parquet, text, a folder of these, a folder that `datasets` saved, a Hub id, or 'embedded:NAME'"

# Tables and archives would otherwise pass for text or fail with an error about bytes.
UNREADABLE_SUFFIXES = (
    ".7z",
    ".arrow",
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


@dataclass
class RecordStream:
    """The records of one source, read anew by every iteration.

    pieces_of_text: the records were cut out of running text, so their ends mean nothing. damaged: how many records
    the latest iteration could not read; first_damage says what was wrong with the first. Iterating raises DataError
    if the very first record cannot be read, for then the source is probably of another kind than its name says.
    """

    source: Source
    pieces_of_text: bool
    read: Callable[[], Iterator[Read]] = field(repr=False)
    damaged: int = 0
    first_damage: str = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.damaged, self.first_damage = 0, ""
        for number, item in enumerate(islice(self.read(), self.source.max_records)):
            if not isinstance(item, DataError):
                yield item
            elif number == 0:
                raise item
            else:
                self.damaged += 1
                self.first_damage = self.first_damage or str(item)

    def field_names(self) -> list[str]:
        """Field names of the first record. Raises DataError if there is none."""
        for record in self:
            return list(record)
        raise DataError(f"{self.source.path}: holds no records; give a source that does")


def load_records(source: Source) -> RecordStream:
    """The records of a source; opens nothing yet, except a Hub data set's description.

    Raises DataError, with the way out, if there is no such file, folder, embedded set or Hub data set.
    """
    place = locate(source.path)
    if place is None:
        return RecordStream(source, False, lambda: _hub(source))
    if place.is_dir():
        return _folder(source, place)
    return RecordStream(source, _is_text(place), lambda: _file(place))


def find_format(source: Source, field_names: Sequence[str]) -> str:
    """The name of the format of a source's records. Raises DataError, naming the source, if they do not fit it."""
    try:
        if source.format == "auto":
            name = formats.detect(field_names, source.fields)
        else:
            known = installed().strategies("data_formats")
            if source.format not in known:
                raise DataError(f"format '{source.format}' is not known{suggestion(source.format, known)}")
            name = source.format
        if name in formats.ROLES:
            formats.roles(name, field_names, source.fields)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from error
    return name


def check_source(source: Source, where: str) -> str:
    """The format of a source whose first record is there and fits; reads no more than that.

    where: what to put before an error, such as the recipe's line. Raises DataError.
    """
    try:
        return find_format(source, load_records(source).field_names())
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def locate(path: str) -> Path | None:
    """The file or folder that a source names, or None for a Hub id. Raises DataError if it is none of these."""
    if path.startswith(EMBEDDED):
        known = {item.name: item.path for item in installed().embedded().values() if item.kind == "data"}
        name = path.removeprefix(EMBEDDED)
        if name not in known:
            raise DataError(f"'{path}': no plugin brings an embedded data set of that name{suggestion(name, known)}")
        return known[name]
    place = Path(path).expanduser()
    if place.exists():
        return place
    looks_local = path.startswith((".", "/", "~")) or place.suffix in (".jsonl", ".json", ".parquet", *TEXT_SUFFIXES)
    if path.count("/") == 1 and not looks_local:
        return None
    raise DataError(
        f"{path}: there is no such file or folder (paths are relative to where the command is typed); give {KINDS}"
    )


def cut_text(lines: Iterable[str], characters: int = TEXT_RECORD_CHARACTERS) -> Iterator[str]:
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


def _is_text(path: Path) -> bool:
    return path.suffix not in (".jsonl", ".ndjson", ".json", ".parquet")


def _file(path: Path) -> Iterator[Read]:
    if path.suffix in UNREADABLE_SUFFIXES:
        raise DataError(f"{path}: files ending in {path.suffix} are not read; convert it to jsonl or parquet")
    read = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet}.get(path.suffix, _text)
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); give {KINDS}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path) -> Iterator[Read]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _record(json.loads(line), f"{path}:{number}")
            except ValueError as error:
                yield DataError(f"{path}:{number}: is not JSON ({error}); a jsonl file has one JSON object per line")


def _json(path: Path) -> Iterator[Read]:
    text = path.read_text(encoding="utf-8")
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
        raise DataError(f"{path}: is a JSON {type(content).__name__}; give a list of objects, or jsonl")
    for number, item in enumerate(content):
        yield _record(item, f"{path}: item {number}")


def _record(item: Any, where: str) -> Read:
    if isinstance(item, dict):
        return item
    return DataError(f'{where}: is a JSON {type(item).__name__}, not an object such as {{"text": ...}}')


def _parquet(path: Path) -> Iterator[Read]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a whole parquet file ({error}); copy or download it again") from error


def _text(path: Path) -> Iterator[Read]:
    with path.open(encoding="utf-8") as file:
        for piece in cut_text(file):
            if "\0" in piece:
                raise DataError(f"{path}: holds zero bytes, so it is not text; give {KINDS}")
            yield {"text": piece}


def _folder(source: Source, folder: Path) -> RecordStream:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return RecordStream(source, False, lambda: _saved(source, folder))
    suffixes = (".jsonl", ".ndjson", ".json", ".parquet", *TEXT_SUFFIXES)
    files = sorted(file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise DataError(f"{folder}: holds neither a data set that `datasets` saved nor files ending in {suffixes}")
    if len({_is_text(file) for file in files}) > 1:
        raise DataError(f"{folder}: mixes text files with files of records; name them as separate sources")
    return RecordStream(source, _is_text(files[0]), lambda: chain.from_iterable(_file(file) for file in files))


def _saved(source: Source, folder: Path) -> Iterator[Read]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # a dozen kinds, from Arrow to JSON; all mean the folder is not whole
        raise DataError(
            f"{folder}: `datasets` cannot read it ({type(error).__name__}: {error}); save it again"
        ) from error
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            raise DataError(f"{folder}: has no split '{source.split}'{suggestion(source.split, map(str, saved))}")
        saved = saved[source.split]
    yield from saved


def _hub(source: Source) -> Iterator[Read]:
    from datasets import load_dataset

    try:
        yield from load_dataset(
            source.path, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as error:  # whatever the Hub client, the network or the data set's files raise
        reason = str(error).split("\n")[0]
        raise DataError(
            f"'{source.path}' (config {source.config}, split {source.split}): there is no such file here, and the Hub "
            f"could not give it: {type(error).__name__}: {reason}; check name, config, split, access and network, or "
            "give local files"
        ) from error
