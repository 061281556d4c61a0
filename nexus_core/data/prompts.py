"""Prompts of data sources as tokens: what a model is given when it is to write the rest itself.

Prompts and conversations are written in the model's chat template up to where its answer begins; running text is given
as it is, to be gone on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from nexus_core.data import formats
from nexus_core.data.conversations import question
from nexus_core.data.documents import TOKENIZED_AT_ONCE
from nexus_core.data.formats import ASKING
from nexus_core.data.passages import MissingPromptError
from nexus_core.data.records import load_records
from nexus_core.data.source_report import SourceReport
from nexus_core.data.tokenizers import begin_token_id
from nexus_core.errors import DataError, suggestion
from nexus_core.recipe.schema import Records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prompt:
    """tokens: what the model is given. asked: what the record asks, as `formats.opening` says it. continues_text:
    whether it is running text.
    """

    tokens: list[int]
    asked: Any
    continues_text: bool


def read_prompts(
    sources: Sequence[Records], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> tuple[list[Prompt], list[SourceReport]]:
    """All prompts, source after source in the order they are stored, and what became of the records.

    Of running text longer than max_tokens the beginning is used; other prompts of that length are left out. Raises
    DataError if a source is missing, of another shape, or gives no prompt at all.
    """
    begin = begin_token_id(tokenizer)
    prompts: list[Prompt] = []
    reports = []
    for source in sources:
        report = SourceReport(source.path, check_prompts(source, source.path))
        before = len(prompts)
        texts = _texts(source, report, tokenizer)
        while batch := list(islice(texts, TOKENIZED_AT_ONCE)):
            encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for (_, asked), tokens in zip(batch, encoded, strict=True):
                if begin is not None and tokens[:1] != [begin]:
                    tokens = [begin, *tokens]
                is_text = report.format == "text"
                if len(tokens) > max_tokens:
                    if not is_text:
                        report.too_long += 1
                        continue
                    report.oversize += 1
                prompts.append(Prompt(tokens[:max_tokens], asked, is_text))
                report.tokens += len(prompts[-1].tokens)
        report.documents, report.passes = len(prompts) - before, 1
        if not report.documents:
            raise DataError(f"{source.path}: none of its {report.records} records is a prompt: {report.left_out()}")
        reports.append(report)
    return prompts, reports


def check_prompts(source: Records, where: str) -> str:
    """The format of a source of prompts whose first record is there and fits; reads no more than that.

    where: what to put before an error. Raises DataError.
    """
    try:
        names = load_records(source).field_names()
        if source.format == "auto":
            name = formats.detect(names, source.fields, ASKING)
        elif source.format in ASKING:
            name = source.format
        else:
            raise DataError(
                f"prompts cannot be read in the format '{source.format}'{suggestion(source.format, ASKING)}"
            )
        formats.roles(name, names, source.fields, ASKING)
    except DataError as error:
        message = str(error)
        raise DataError(message if message.startswith(where) else f"{where}: {message}") from error
    return name


def _texts(source: Records, report: SourceReport, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, Any]]:
    """Of every usable record the text that the model is given, and what it asks."""
    records = load_records(source)
    for record in records:
        report.records += 1
        try:
            text = _text(record, source.fields, report.format, tokenizer)
            text.encode()
        except MissingPromptError:
            report.missing_prompt += 1
            continue
        except (DataError, UnicodeEncodeError) as error:
            report.unreadable += 1
            report.first_problem = report.first_problem or f"{source.path}: a record: {error}"
            continue
        if not text.strip():
            report.empty += 1
            continue
        yield text, formats.opening(report.format, record, source.fields, ASKING)
    report.records += records.damaged
    report.unreadable += records.damaged
    report.first_problem = report.first_problem or records.first_damage


def _text(
    record: Mapping[str, Any], fields: Mapping[str, str], format_name: str, tokenizer: PreTrainedTokenizerFast
) -> str:
    if format_name == "text":
        return formats.text(record, fields, tokenizer).text
    turns, tools = formats.asking_turns(format_name, record, fields)
    if tokenizer.chat_template or format_name != "prompt_response":
        return question(turns, tokenizer, tools)
    return "".join(f"{turn['content']}\n" for turn in turns)
