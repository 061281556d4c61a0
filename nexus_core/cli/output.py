"""What the commands say and how: the answer on stdout, progress and errors on stderr, one exit code for each kind."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

import click

from nexus_core.errors import NexusError
from nexus_core.processes import INTERRUPTED, first_to_fail, world_if_any

FAILED = 1

# Libraries read these when they are imported; what a user has set stays. TOKENIZERS_PARALLELISM is not among them:
# left alone, tokenizers use all cores and stop doing so in a forked process; set to true, such a process hangs.
QUIET_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # Loading a model would draw one per load; downloads have their own, see nexus_core.checkpoint.source.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Between processes, a closed connection is told with a C++ traceback on each of them.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# GNU OpenMP's threads spin for milliseconds at every barrier. Where another process wants the core, that is time lost
# to all: on two cores, the demo's training fell from 3,300 tokens/s to about 200 beside one other busy process, and to
# about 900 with this number of turns before a thread sleeps.
THREAD_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


class _Line(logging.Formatter):
    """Begins as the lines that training and `nexus check` write: "warning: ..."."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def quieten(debug: bool = False) -> None:
    """Silence what other libraries say about themselves; called before any of them is imported.

    NEXUS's own warnings go to stderr, one line each. With `debug` nothing is silenced. Threads are told to sleep rather
    than spin.
    """
    for name, value in THREAD_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(handlers=[handler], level=logging.INFO if debug else logging.ERROR)
    logging.getLogger("nexus_core").setLevel(logging.DEBUG if debug else logging.WARNING)
    if debug:
        return
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|transformers|datasets|mlflow|huggingface_hub)"
    )


def open_closed_streams() -> None:
    """Give a process that was started without an output, as some daemons do it, one that goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for as long as the process lives


def exit_code_of(error: BaseException, debug: bool) -> int:
    """Say on stderr what went wrong, with the traceback if `debug`, and return the exit code.

    Of several processes, only the one that failed first says it.
    """
    if isinstance(error, BrokenPipeError):
        # Whoever read our stdout has seen enough, as `head` does.
        _discard_stdout()
        return 0
    if _is_disk_full(error) and not error.filename:
        _discard_stdout()
    if debug and not isinstance(error, click.ClickException):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show(sys.stderr)
        return error.exit_code
    if isinstance(error, NexusError):
        code = error.exit_code
    else:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt | click.Abort) else FAILED
    if first_to_fail(error, sentence(error), code):
        _to_stderr(sentence(error))
    return code


def sentence(error: BaseException) -> str:
    """An error as the person at the keyboard reads it."""
    if isinstance(error, NexusError):
        return str(error)
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted"
    if _is_disk_full(error):
        return (
            f"{error.filename or 'what is printed'}: the disk is full; free some space and type the same command again"
        )
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}; this is not expected, run again with --debug to see where it happens"


def _is_disk_full(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def _discard_stdout() -> None:
    # Python flushes once more at exit, and would complain once more: give it a sink.
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_done(as_json: bool, answer: Mapping[str, Any], lines: Callable[[], Iterable[str]]) -> None:
    """Say that a command is done: as one JSON object of status "done" and what `answer` gives, or as lines of text.

    Of several processes only the first one says it.
    """
    if not world_if_any().is_first:
        return
    if as_json:
        print_json({"status": "done", **answer})
    else:
        click.echo("\n".join(lines()))


def print_json(answer: Mapping[str, Any]) -> None:
    """One line of JSON on stdout: paths as text, numbers that are not finite as null."""
    click.echo(json.dumps(_jsonable(answer), ensure_ascii=False, allow_nan=False))


@contextmanager
def failure_as_json(as_json: bool, rest: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
    """With `--json`, an error is also an object: status "failed", the error's text, and what `rest` gives."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if as_json and world_if_any().is_first:
            print_json({"status": "failed", **rest(), "error": sentence(error)})
        raise


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _to_stderr(text: str) -> None:
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {text}", err=True)
