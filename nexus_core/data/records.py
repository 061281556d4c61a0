"""The records of a data source as dicts, one at a time, whatever the source is stored as.

Local files are streamed; nothing is copied into a cache. Saved folders and Hub data sets go through the `datasets`
library, Hub ones in its streaming mode. Where a source has several files, shards or, saved by `datasets`, random
access, a seed shuffles them; what remains to be shuffled are records that lie near each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nexus_core.data import formats
from nexus_core.data.files import KINDS, RECORD_SUFFIXES, TEXT_SUFFIXES, Read, is_text, read_file
from nexus_core.errors import DataError, suggestion
from nexus_core.plugins import installed
from nexus_core.recipe.schema import GENERATED, Records

EMBEDDED = "embedded:"

# Reads a source: in the order it is stored for None, else in one that depends on this seed alone.
Reader = Callable[[int | None], Iterator[Read]]


@dataclass
class RecordStream:
    """The records of one source, read anew by every iteration.

    pieces_of_text: the records were cut out of running text, so their ends mean nothing. damaged: how many records
    the latest iteration could not read; first_damage says what was wrong with the first.
    """

    source: Records
    pieces_of_text: bool
    read: Reader = field(repr=False)
    damaged: int = 0
    first_damage: str = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """As they are stored. Raises DataError if the very first record cannot be read, for then the source is
        probably of another kind than its name says.
        """
        return self.in_order(None)

    def in_order(self, seed: int | None) -> Iterator[dict[str, Any]]:
        """Files, shards or rows in an order that depends on the seed, as far as the source allows; None as stored.

        With `max_records` they are the first as stored, whatever the seed, so that every stage reads the same ones.
        """
        self.damaged, self.first_damage = 0, ""
        seed = None if self.source.max_records else seed
        for number, item in enumerate(islice(self.read(seed), self.source.max_records)):
            if not isinstance(item, DataError):
                yield item
            elif number == 0 and seed is None:
                raise item
            else:
                self.damaged += 1
                self.first_damage = self.first_damage or str(item)

    def field_names(self) -> list[str]:
        """Field names of the first record. Raises DataError if there is none."""
        for record in self:
            return list(record)
        raise DataError(f"{self.source.path}: holds no records; give a source that does")


def load_records(source: Records) -> RecordStream:
    """The records of a source; opens nothing yet, except a Hub data set's description.

    Raises DataError, with the way out, if there is no such file, folder, embedded set or Hub data set.
    """
    place = locate(source.path)
    if place is None:
        return RecordStream(source, False, lambda seed: _hub(source, seed))
    if place.is_dir():
        return _folder(source, place)
    return RecordStream(source, is_text(place), lambda _: read_file(place, source.piece_characters))


def find_format(source: Records, field_names: Sequence[str]) -> str:
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


def check_source(source: Records, where: str) -> str:
    """The format of a source whose first record is there and fits; reads no more than that.

    where: what to put before an error, such as the recipe's line. Raises DataError.
    """
    try:
        return find_format(source, load_records(source).field_names())
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def locate(path: str) -> Path | None:
    """The file or folder that a source names, or None for a Hub id. Raises DataError if it is none of these."""
    if path.startswith(GENERATED):
        raise DataError(
            f"'{path}': what a model writes itself can be named in a recipe only, with a `generate` section; elsewhere "
            "give the file that `nexus generate` wrote"
        )
    if path.startswith(EMBEDDED):
        known = {item.name: item.path for item in installed().embedded().values() if item.kind == "data"}
        name = path.removeprefix(EMBEDDED)
        if name not in known:
            raise DataError(f"'{path}': no plugin brings an embedded data set of that name{suggestion(name, known)}")
        return known[name]
    place = Path(path).expanduser()
    if place.exists():
        return place
    looks_local = path.startswith((".", "/", "~")) or place.suffix in (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
    if path.count("/") == 1 and not looks_local:
        return None
    raise DataError(
        f"{path}: there is no such file or folder (paths are relative to where the command is typed); give {KINDS}"
    )


def _folder(source: Records, folder: Path) -> RecordStream:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return RecordStream(source, False, lambda seed: _saved(source, folder, seed))
    suffixes = (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
    files = sorted(file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise DataError(
            f"{folder}: holds neither a data set that `datasets` saved nor files that are read; give {KINDS}"
        )
    if len({is_text(file) for file in files}) > 1:
        raise DataError(f"{folder}: mixes text files with files of records; name them as separate sources")
    return RecordStream(source, is_text(files[0]), lambda seed: _files(source, files, seed))


def _files(source: Records, files: Sequence[Path], seed: int | None) -> Iterator[Read]:
    order = range(len(files)) if seed is None else np.random.default_rng(seed).permutation(len(files)).tolist()
    for number in order:
        yield from read_file(files[number], source.piece_characters)


def _saved(source: Records, folder: Path, seed: int | None) -> Iterator[Read]:
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
    # In memory, or the order would be cached in a file inside the user's folder.
    yield from saved if seed is None else saved.shuffle(seed=seed, keep_in_memory=True)


def _hub(source: Records, seed: int | None) -> Iterator[Read]:
    from datasets import load_dataset

    try:
        stream = load_dataset(source.path, source.config, split=source.split, revision=source.revision, streaming=True)
        # The order of the shards; records are shuffled by whoever reads, so a buffer of one is enough here.
        yield from stream if seed is None else stream.shuffle(seed=seed, buffer_size=1)
    except Exception as error:  # whatever the Hub client, the network or the data set's files raise
        reason = str(error).split("\n")[0]
        config = f"config {source.config}, " if source.config else ""
        raise DataError(
            f"'{source.path}' ({config}split {source.split}): there is no such file here, and the Hub could not give "
            f"it: {type(error).__name__}: {reason}; check name, config, split, access and network, or give local files"
        ) from error
