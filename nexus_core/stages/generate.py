"""Text that the base writes itself after prompts: what is to be kept of a model is best shown by the model."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.additions import as_teacher
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.checkpoint.writer import atomic_file, write_json
from nexus_core.data.generated import COMPLETION, PROMPT, record_of
from nexus_core.data.prompts import Prompt, read_prompts
from nexus_core.data.source_report import SourceReport
from nexus_core.data.tokenizers import end_token_id, load_tokenizer, reply_end_ids
from nexus_core.errors import StageError, UsageError
from nexus_core.models import compute_dtype, load, stated_end_ids
from nexus_core.processes import barrier, together, world
from nexus_core.progress import Progress
from nexus_core.recipe.schema import Generate, Recipe
from nexus_core.stages.completions import Writing, complete
from nexus_core.stages.stage import COMPLETIONS, GENERATE, Metrics, Stage, StageContext, reads_generated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPORT_NAME = "report.json"
CHUNKS_NAME = "chunks"

# Completions of one file of the work in progress: what an interrupted job writes again.
CHUNK_COMPLETIONS = 64

COUNTS = ("completions", "cut", "empty", "prompt_tokens", "completion_tokens")

# From so many cut or empty completions on, somebody should look at the settings.
NOTABLE_SHARE = 0.25

log = logging.getLogger(__name__)


def generate(
    checkpoint: Checkpoint,
    wanted: Mapping[str, Generate],
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    base: bool = True,
    report: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> Metrics:
    """Have a model complete prompts, and write NAME.jsonl for every name in `wanted`, and report.json, into `out`.

    base: of a converted or trained model it is the base in it that writes. out: empty, or left by an interrupted call
    with the same arguments, which then goes on. Raises DataError if prompts are missing or none can be used, UsageError
    if prompts and completions together are longer than the model's context.
    """
    _refuse_beyond_context(checkpoint, wanted)
    rate = 0.0
    # The report is written last: where it is, only removing the chunks may be left to do.
    if not together((out / REPORT_NAME).exists):
        tokenizer = load_tokenizer(checkpoint.folder)
        read = {name: read_prompts(item.prompts, tokenizer, item.max_prompt_tokens) for name, item in wanted.items()}
        work = {name: _chunks(out, name, len(prompts), wanted[name]) for name, (prompts, _) in read.items()}
        together(lambda: (out / CHUNKS_NAME).mkdir(exist_ok=True))

        def writers() -> dict[str, _Writer]:
            model = load(checkpoint, dtype=compute_dtype(dtype, device), device=device)
            return {name: _Writer(model, tokenizer, wanted[name], prompts) for name, (prompts, _) in read.items()}

        rate = _write_missing([chunk for chunks in work.values() for chunk in chunks], writers, report, base=base)
        barrier()
        reports = {name: reports for name, (_, reports) in read.items()}
        together(lambda: _finish(out, wanted, work, reports, tokenizer))
    together(lambda: shutil.rmtree(out / CHUNKS_NAME, ignore_errors=True))
    found = together(lambda: json.loads((out / REPORT_NAME).read_text()))
    metrics: Metrics = {count: sum(found[name][count] for name in wanted) for count in COUNTS}
    return metrics | ({"tokens_per_second": rate} if rate else {})


@dataclass(frozen=True)
class _Chunk:
    """Some completions of one name, by their numbers, and the file they are written to."""

    path: Path
    name: str
    numbers: range


def _chunks(out: Path, name: str, prompts: int, settings: Generate) -> list[_Chunk]:
    # A batch lies in one chunk, so what is written does not depend on where a job was interrupted.
    size = -(-CHUNK_COMPLETIONS // settings.batch_size) * settings.batch_size
    total = prompts * settings.samples
    return [
        _Chunk(out / CHUNKS_NAME / f"{name}-{first:08d}{COMPLETIONS}", name, range(first, min(first + size, total)))
        for first in range(0, total, size)
    ]


def _write_missing(
    chunks: Sequence[_Chunk],
    writers: Callable[[], Mapping[str, _Writer]],
    report: Callable[[int, Mapping[str, float]], None],
    *,
    base: bool,
) -> float:
    """Write this process's share of the chunks that are not there yet; tokens per second of all processes.

    writers: by name, made only if there is something to write.
    """
    here, rate = world(), 0.0
    missing = [chunk for chunk in chunks[here.rank :: here.size] if not chunk.path.exists()]
    if not missing:
        return rate
    by_name = writers()
    model = next(iter(by_name.values())).model
    total = sum(len(chunk.numbers) for chunk in chunks)
    with as_teacher(model) if base else nullcontext(), Progress("generate", total, "completions") as progress:
        progress.resume_at(sum(len(chunk.numbers) for chunk in chunks if chunk.path.exists()))
        tokens, started = 0, time.monotonic()
        for chunk in missing:
            with atomic_file(chunk.path) as file:
                for records in by_name[chunk.name].write(chunk.numbers):
                    file.writelines(_line(record) for record in records)
                    tokens += sum(len(record[COMPLETION]) for record in records)
                    # The other processes are taken to be as fast as this one.
                    rate = here.size * tokens / max(time.monotonic() - started, 1e-9)
                    progress.advance(len(records) * here.size, f"{rate:,.0f} tokens/s")
            report(progress.done, {"tokens_per_second": rate})
    return rate


class _Writer:
    """Writes completions of one list of prompts; number n is that of prompt n // samples."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, settings: Generate, prompts: Sequence[Prompt]):
        self.model, self.tokenizer, self.settings, self.prompts = model, tokenizer, settings, prompts
        ends = [*reply_end_ids(tokenizer, stated_end_ids(model)), end_token_id(tokenizer)]
        self.writing = Writing(
            list(dict.fromkeys(ends)),
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            settings.seed,
        )

    def write(self, numbers: range) -> Iterator[list[dict[str, Any]]]:
        """The records of these completions, a batch at a time; prompts of like length are completed together."""
        by_length = sorted(numbers, key=lambda number: len(self._prompt(number).tokens))
        for start in range(0, len(by_length), self.settings.batch_size):
            batch = by_length[start : start + self.settings.batch_size]
            prompts = [self._prompt(number) for number in batch]
            written = complete(self.model, [prompt.tokens for prompt in prompts], batch, self.writing)
            yield [self._record(*item) for item in zip(batch, prompts, written, strict=True)]

    def _prompt(self, number: int) -> Prompt:
        return self.prompts[number // self.settings.samples]

    def _record(self, number: int, prompt: Prompt, completion: list[int]) -> dict[str, Any]:
        record = record_of(
            prompt.asked,
            prompt.tokens,
            completion,
            self.tokenizer,
            ended=completion[-1] in self.writing.ends,
            continues_text=prompt.continues_text,
        )
        return {"number": number, **record}


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"


def _join(out: Path, name: str, chunks: Sequence[_Chunk], tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Put a name's completions into one file, in the order of their prompts, and count them; empty ones stay out.

    Raises StageError if a chunk of another process's cannot be found.
    """
    counts = dict.fromkeys(COUNTS, 0)
    with atomic_file(out / f"{name}{COMPLETIONS}") as file:
        for chunk in chunks:
            try:
                lines = chunk.path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError as error:
                raise StageError(
                    f"{chunk.path}: is not there, though another process wrote it; all machines must see one store"
                ) from error
            for record in sorted(map(json.loads, lines), key=lambda record: record["number"]):
                if not str(tokenizer.decode(record[COMPLETION], skip_special_tokens=True)).strip():
                    counts["empty"] += 1
                    continue
                counts["completions"] += 1
                counts["cut"] += not record["ended"]
                counts["prompt_tokens"] += len(record[PROMPT])
                counts["completion_tokens"] += len(record[COMPLETION])
                del record["number"]
                file.write(_line(record))
    return counts


def _finish(
    out: Path,
    wanted: Mapping[str, Generate],
    work: Mapping[str, Sequence[_Chunk]],
    reports: Mapping[str, Sequence[SourceReport]],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Join the chunks, say what was left out and cut, and write report.json."""
    counts = {name: _join(out, name, chunks, tokenizer) for name, chunks in work.items()}
    for name, found in counts.items():
        for report in reports[name]:
            if report.left_out():
                log.warning("%s: of %s records, left out: %s", report.path, f"{report.records:,}", report.left_out())
        if not found["completions"]:
            raise StageError(f"generate.{name}: the model wrote nothing after any of its prompts, only its end token")
        if found["cut"] > NOTABLE_SHARE * found["completions"]:
            log.warning(
                "generate.%s: %s of %s completions were cut at max_new_tokens %s, so they have no end to learn",
                *(name, f"{found['cut']:,}", f"{found['completions']:,}", wanted[name].max_new_tokens),
            )
        if found["empty"] > NOTABLE_SHARE * (found["completions"] + found["empty"]):
            log.warning("generate.%s: %s completions were empty and are left out", name, f"{found['empty']:,}")
    content = {name: {**counts[name], "prompts": [asdict(report) for report in reports[name]]} for name in counts}
    write_json(out / REPORT_NAME, content)


def _refuse_beyond_context(checkpoint: Checkpoint, wanted: Mapping[str, Generate]) -> None:
    context = checkpoint.config.get("max_position_embeddings")
    for name, settings in wanted.items():
        needed = settings.max_prompt_tokens + settings.max_new_tokens
        if isinstance(context, int) and needed > context:
            raise UsageError(
                f"generate.{name}: max_prompt_tokens {settings.max_prompt_tokens} and max_new_tokens "
                f"{settings.max_new_tokens} are more than the {context} tokens that {checkpoint.name} can read; "
                "lower one of them"
            )


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {name: settings.model_dump(mode="json") for name, settings in recipe.generate.items()}


def _run(context: StageContext) -> Metrics:
    recipe = context.recipe
    return generate(
        context.checkpoint,
        recipe.generate,
        context.out,
        dtype=recipe.model.dtype,
        device=context.device,
        report=context.report,
    )


STAGE = Stage(
    name=GENERATE,
    version=1,
    inputs=(),
    settings=_settings,
    run=_run,
    resumes=True,
    splits=True,
    runs_model=True,
    wanted=lambda recipe: reads_generated(recipe, recipe.data),
)
