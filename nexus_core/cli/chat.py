"""`nexus chat`: talk to a model, base or trained, over a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from nexus_core.cli.options import device_option, dtype_option, revision_option

if TYPE_CHECKING:
    from nexus_core.cli.conversation import Conversation, Reply

QUIT, RESET = "/quit", "/reset"


@click.command("chat")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--base", is_flag=True, help="Talk to the base: shared experts and router changes are off.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of an answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of sampling; 0 always takes the most likely token.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling.")
@dtype_option
@device_option
@revision_option
def command(
    model: str,
    system: str | None,
    base: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    revision: str | None,
) -> None:
    """Talk to MODEL in its own chat format.

    On a terminal: /reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer. Over a pipe every line is a turn
    of one conversation, and answers are a blank line apart.
    """
    import torch

    from nexus_core.additions import as_teacher
    from nexus_core.checkpoint.source import open_checkpoint
    from nexus_core.cli.conversation import Conversation
    from nexus_core.data.tokenizers import load_tokenizer
    from nexus_core.models import choose_device, compute_dtype, load

    checkpoint = open_checkpoint(model, revision)
    tokenizer = load_tokenizer(checkpoint.folder)
    place = choose_device(device)
    loaded = load(checkpoint, dtype=compute_dtype(dtype, place), device=place)
    conversation = Conversation(loaded, tokenizer, checkpoint, max_new_tokens, temperature, system)
    torch.manual_seed(seed)
    with as_teacher(loaded) if base else nullcontext():
        if sys.stdin.isatty():
            _over_terminal(conversation, f"{model}{' (base)' if base else ''}")
        else:
            _over_pipe(conversation)


def _over_terminal(conversation: Conversation, name: str) -> None:
    from nexus_core.errors import UsageError

    click.echo(f"{name}; {RESET} begins anew, {QUIT} or Ctrl-D ends", err=True)
    for text in _typed_lines():
        if text == QUIT:
            return
        if text == RESET:
            conversation.reset()
            continue
        try:
            reply = conversation.ask(text, _Speech())
        except KeyboardInterrupt:
            click.echo("\n(stopped; this exchange is forgotten)\n", err=True)
            continue
        except UsageError as error:
            click.echo(f"{error}\n", err=True)
            continue
        click.echo()
        click.echo(_remark(conversation, reply), err=True)


def _over_pipe(conversation: Conversation) -> None:
    is_first = True
    for text in _piped_lines():
        if text == QUIT:
            return
        if text == RESET:
            conversation.reset()
        elif text:
            click.echo("" if is_first else "\n", nl=False)
            is_first = False
            reply = conversation.ask(text, lambda _, answer: click.echo(answer, nl=False))
            click.echo()
            if remark := _remark(conversation, reply):
                click.echo(remark, err=True)


def _piped_lines() -> Iterator[str]:
    from nexus_core.errors import UsageError

    try:
        for line in sys.stdin:
            text = line.strip()
            # In some locales Python reads bytes that are not UTF-8 as lone surrogates, which no tokenizer takes.
            text.encode()
            yield text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UsageError("standard input: is not UTF-8 text; save it as UTF-8") from error


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401 - gives input() line editing and history

    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if text:
            yield text


class _Speech:
    """Prints a reply as it comes: thoughts dim, a blank line, then the answer."""

    def __init__(self) -> None:
        self._has_thoughts = self._has_answer = False

    def __call__(self, thoughts: str, answer: str) -> None:
        if thoughts:
            click.echo(click.style(thoughts, dim=True), nl=False)
            self._has_thoughts = True
        if answer:
            gap = "\n\n" if self._has_thoughts and not self._has_answer else ""
            click.echo(gap + answer, nl=False)
            self._has_answer = True


def _remark(conversation: Conversation, reply: Reply) -> str:
    if reply.is_finished:
        return "" if reply.answer.strip() else "(an empty answer)"
    return f"(stopped after {reply.tokens} tokens; --max-new-tokens {2 * conversation.max_new_tokens} allows more)"
