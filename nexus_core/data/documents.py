"""The documents of a data set: its sources mixed by weight, in random order, tokenized."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nexus_core.data import formats
from nexus_core.data.learnt_tokens import tokenize
from nexus_core.data.passages import MissingPromptError, Passage, Written
from nexus_core.data.records import find_format, load_records
from nexus_core.data.source_report import SHORTEST_DOCUMENT, SourceReport
from nexus_core.data.tokenizers import begin_token_id
from nexus_core.errors import DataError
from nexus_core.plugins import installed
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Part = Literal["train", "held_out", "all"]

# Records are drawn at random out of this many read ahead: smaller sources are shuffled fully, memory stays bounded.
SHUFFLE_RECORDS = 10_000

# Records tokenized at once; the tokenizer spreads them over the cores.
TOKENIZED_AT_ONCE = 256

# A book or a log that somebody put into one record would swamp the sample, and the memory: it is cut here.
LONGEST_PASSAGE_CHARACTERS = 1_000_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """Tokens (n,) int32 of one record; learns (n,) bool says which of them count in losses when they are predicted.

    source: the path it came from. learns_end: whether the end token that packing puts behind it counts as well.
    """

    tokens: np.ndarray
    learns: np.ndarray
    source: str
    learns_end: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Documents(Sequence[Document]):
    """The documents of one data set, in the order they were drawn; report has one entry per source."""

    items: list[Document]
    report: list[SourceReport]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.items)

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(source.tokens for source in self.report)

    def report_as_dict(self) -> list[dict[str, Any]]:
        """The report as plain data."""
        return [asdict(source) for source in self.report]


def documents(
    sources: Sequence[Source],
    part: Part,
    tokenizer: PreTrainedTokenizerFast,
    *,
    limit_tokens: int | None = None,
    candidates: int | None = None,
    seed: int = 0,
    repeat: bool = False,
) -> Documents:
    """The documents of a data set, the sources' tokens in the ratio of their weights as far as they last.

    part: which side of each source's split by content hash. limit_tokens: stop as soon as there are so many tokens
    and, where given, also `candidates` documents. repeat: read a source again when it has run out before the others,
    so that the ratio holds; without it the others go on alone. Raises DataError if a source is missing, has other
    fields than its format needs, or gives no document at all.
    """
    readers = [_SourceReader(source, part, tokenizer, (seed, number)) for number, source in enumerate(sources)]
    at_least = candidates or 0
    if limit_tokens is None:
        limit_tokens = 0 if at_least else sys.maxsize
    items: list[Document] = []
    taken = [0] * len(readers)
    waiting = list(range(len(readers)))
    # Where documents are counted too, or there is no limit, nobody knows how many tokens there will be.
    total = 0 if at_least or limit_tokens >= sys.maxsize else limit_tokens
    with Progress("read", total, "tokens") as progress:
        while waiting and (sum(taken) < limit_tokens or len(items) < at_least):
            # The source that is furthest behind its share comes next.
            number = min(waiting, key=lambda number: (taken[number] / sources[number].weight, number))
            document = next(readers[number], None)
            if document is not None:
                items.append(document)
                taken[number] += len(document)
                progress.advance(len(document))
            elif repeat and readers[number].report.documents and any(reader.report.passes == 0 for reader in readers):
                readers[number].start_again()
            else:
                waiting.remove(number)
    for reader in readers:
        reader.refuse_if_empty()
        reader.warn()
    return Documents(items, [reader.report for reader in readers])


def is_held_out(content: Any, share: float) -> bool:
    """Whether a record belongs to the held-out part: decided by the SHA-256 of its content alone.

    So equal content always falls on the same side, whatever file it is in and whatever is added to it later. content:
    plain data, of a record what `formats.opening` says.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    digest = hashlib.sha256(canonical.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_parts(source: Source, parts: Sequence[Part]) -> None:
    """Raises DataError if no record of a source belongs to one of the parts; reads until each has one, once."""
    missing, read, name = set(parts), 0, ""
    for record in load_records(source):
        read += 1
        name = name or find_format(source, list(record))
        is_out = is_held_out(formats.opening(name, record, source.fields), source.held_out)
        missing.discard("held_out" if is_out else "train")
        if not missing:
            return
    raise _empty_part(source, min(missing), read)


def _empty_part(source: Source, part: Part, records: int) -> DataError:
    return DataError(
        f"{source.path}: none of its {records:,} records falls into the part '{part}' at held_out {source.held_out}; "
        "give more records, or change `held_out`"
    )


class _SourceReader(Iterator[Document]):
    """The documents of one source, in random order; iterates until one pass is over, then anew after start_again."""

    def __init__(self, source: Source, part: Part, tokenizer: PreTrainedTokenizerFast, seed: tuple[int, ...]):
        self.source, self.part, self.tokenizer, self.seed = source, part, tokenizer, seed
        self.records = load_records(source)
        self.report = SourceReport(source.path, find_format(source, self.records.field_names()))
        self._format = installed().strategies("data_formats")[self.report.format].function
        self._begin = begin_token_id(tokenizer)
        self._documents = self._one_pass()

    def __next__(self) -> Document:
        return next(self._documents)

    def start_again(self) -> None:
        self._documents = self._one_pass()

    def refuse_if_empty(self) -> None:
        report = self.report
        if report.documents or not report.passes:
            return
        if report.other_part == report.records:
            raise _empty_part(self.source, self.part, report.records)
        raise DataError(f"{report.path}: none of its {report.records} records can be used: {report.left_out()}")

    def warn(self) -> None:
        report = self.report
        if report.left_out():
            log.warning("%s: of %s records, left out: %s", report.path, f"{report.records:,}", report.left_out())
        if report.oversize:
            log.warning(
                "%s: %s records are longer than %s characters; only their beginning is used",
                *(report.path, report.oversize, f"{LONGEST_PASSAGE_CHARACTERS:,}"),
            )
        if report.passed_by():
            log.warning(
                "%s: only the field '%s' is read, but %s hold more text; if that is wanted, write `format: text`, "
                "else say which field is what, e.g. `fields: {prompt: ..., response: ...}`",
                *(report.path, formats.roles("text", self.records.field_names(), {})["text"], report.passed_by()),
            )

    def _one_pass(self) -> Iterator[Document]:
        generator = np.random.default_rng([*self.seed, self.report.passes])
        order = int(generator.integers(2**31))
        shuffled = _shuffled(self._records_of_part(order), generator)
        while batch := list(islice(shuffled, TOKENIZED_AT_ONCE)):
            yield from self._tokenized([passage for record in batch for passage in self._passages(record)])
        self.report.passes += 1

    def _records_of_part(self, order: int) -> Iterator[dict[str, Any]]:
        report, fields = self.report, self.source.fields
        damaged = 0
        for record in self.records.in_order(order):
            damaged = self._count_damaged(damaged)
            report.records += 1
            content = formats.opening(report.format, record, fields)
            if self.part == "all" or is_held_out(content, self.source.held_out) == (self.part == "held_out"):
                yield record
            else:
                report.other_part += 1
        self._count_damaged(damaged)

    def _count_damaged(self, before: int) -> int:
        new = self.records.damaged - before
        if new:
            self.report.records += new
            self.report.unreadable += new
            self.report.first_problem = self.report.first_problem or self.records.first_damage
        return self.records.damaged

    def _passages(self, record: dict[str, Any]) -> list[Passage | Written]:
        report = self.report
        try:
            made = self._format(record, self.source.fields, self.tokenizer)
            passages: list[Passage | Written] = [made] if isinstance(made, Passage | Written) else list(made)
            for passage in passages:
                # A lone half of a surrogate pair is valid in JSON but not in UTF-8.
                passage.text.encode()
        except MissingPromptError:
            report.missing_prompt += 1
            return []
        except (DataError, UnicodeEncodeError) as error:
            report.unreadable += 1
            report.first_problem = report.first_problem or f"{self.source.path}: a record: {error}"
            return []
        if not any(passage.text.strip() for passage in passages):
            report.empty += 1
            return []
        self._count_unread(record)
        if any(len(passage.text) > LONGEST_PASSAGE_CHARACTERS for passage in passages):
            report.oversize += 1
            passages = [passage.cut(LONGEST_PASSAGE_CHARACTERS) for passage in passages]
        return passages

    def _count_unread(self, record: dict[str, Any]) -> None:
        if self.source.format != "auto" or self.source.fields or self.report.format != "text":
            return
        read = formats.roles("text", record, {})["text"]
        for name, value in record.items():
            if name == read:
                self.report.characters += len(value)
            elif characters := _characters(value):
                self.report.unread[name] = self.report.unread.get(name, 0) + characters

    def _tokenized(self, passages: list[Passage | Written]) -> Iterator[Document]:
        report = self.report
        for passage, (tokens, learns) in zip(passages, tokenize(passages, self.tokenizer), strict=True):
            if len(tokens) < SHORTEST_DOCUMENT:
                report.too_short += 1
                continue
            if not learns.any():
                report.nothing_to_learn += 1
                continue
            learns_end = passage.learns_end and not self.records.pieces_of_text
            if self._begin is not None and tokens[0] != self._begin:
                tokens, learns = [self._begin, *tokens], np.concatenate([[False], learns])
            report.documents += 1
            report.tokens += len(tokens)
            yield Document(np.array(tokens, dtype=np.int32), learns, self.source.path, learns_end)


def _characters(value: Any) -> int:
    """Of a text or a list of texts."""
    if isinstance(value, str):
        return len(value)
    return sum(len(item) for item in value if isinstance(item, str)) if isinstance(value, list) else 0


def _shuffled(records: Iterable[dict[str, Any]], generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    ahead: list[dict[str, Any]] = []
    for record in records:
        if len(ahead) < SHUFFLE_RECORDS:
            ahead.append(record)
            continue
        place = int(generator.integers(SHUFFLE_RECORDS))
        yield ahead[place]
        ahead[place] = record
    for place in generator.permutation(len(ahead)):
        yield ahead[place]
