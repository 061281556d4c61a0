"""`nexus chat`: the model's own format, turn after turn, streamed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from command_line import call
from gpt_oss_checkpoints import write_tiny_checkpoint
from nexus_gpt_oss.harmony import reply_parts

import nexus_core
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.cli.conversation import Conversation
from nexus_core.data.tokenizers import load_tokenizer
from nexus_core.errors import UsageError
from nexus_core.recipe.schema import Convert
from nexus_core.select import LayerSelection, Selection
from nexus_core.stages.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", vocabulary=300, tokenizer=True)


def conversation(folder: Path, **settings: object) -> Conversation:
    checkpoint = open_checkpoint(folder)
    model = nexus_core.load(checkpoint, dtype=torch.float32)
    return Conversation(model, load_tokenizer(folder), checkpoint, **{"max_new_tokens": 12, **settings})


def script(talk: Conversation, *texts: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the model say these texts, one a call, and return the prompts it got."""
    prompts: list[str] = []
    replies = iter(texts)

    def generate(**given: object) -> None:
        input_ids, stream = given["input_ids"], given["streamer"]
        prompts.append(talk.tokenizer.decode(input_ids[0]))
        stream.put(input_ids)
        for token in talk.tokenizer(next(replies), add_special_tokens=False)["input_ids"]:
            stream.put(torch.tensor([token]))
        stream.end()

    monkeypatch.setattr(talk.model, "generate", generate)
    return prompts


def test_every_turn_is_asked_in_the_models_own_template_with_all_that_was_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = conversation(folder, system="be brief")
    prompts = script(talk, "hello<|end|>", "fine<|end|>", monkeypatch=monkeypatch)

    talk.ask("hi", lambda *_: None)
    talk.ask("how are you?", lambda *_: None)

    start = "<|start|>system<|message|>be brief<|end|><|start|>user<|message|>hi<|end|><|start|>assistant<|message|>"
    assert prompts[0] == start
    assert prompts[1] == (
        start + "hello<|end|><|start|>user<|message|>how are you?<|end|><|start|>assistant<|message|>"
    )


def test_reset_forgets_all_but_the_system_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(folder, system="be brief")
    prompts = script(talk, "hello<|end|>", "hello<|end|>", monkeypatch=monkeypatch)

    talk.ask("hi", lambda *_: None)
    talk.reset()
    talk.ask("hi", lambda *_: None)

    assert prompts[0] == prompts[1]


def test_the_reply_is_streamed_in_whole_characters_without_special_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = conversation(folder)
    script(talk, "a café 🙂!<|end|>", monkeypatch=monkeypatch)  # é is two byte tokens, the smile four
    heard: list[str] = []

    reply = talk.ask("hi", lambda thoughts, answer: heard.append(answer))

    assert heard == list("a café 🙂!")
    assert (reply.answer, reply.is_finished) == ("a café 🙂!", True)


def test_thoughts_are_told_apart_and_not_repeated_to_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(folder)
    for token in ("<|channel|>", "<|return|>"):
        talk.tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    reply_text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>"
    prompts = script(talk, reply_text, "ok", monkeypatch=monkeypatch)

    reply = talk.ask("sure?", lambda *_: None)
    talk.ask("really?", lambda *_: None)

    assert (reply.thoughts, reply.answer) == ("hm", "yes")
    assert "<|message|>yes<|end|>" in prompts[1]
    assert "hm" not in prompts[1]


def test_the_model_stops_at_the_ends_its_settings_and_its_template_name(folder: Path) -> None:
    talk = conversation(folder)
    ids = talk.tokenizer.convert_tokens_to_ids

    assert talk.end_tokens() == [ids("<|return|>"), ids("<|end|>")]
    talk.model.generation_config.eos_token_id = [7, ids("<|end|>")]
    assert talk.end_tokens() == [7, ids("<|end|>")]


def test_a_conversation_longer_than_the_context_is_refused(folder: Path) -> None:
    talk = conversation(folder)
    talk.model.config.max_position_embeddings = 10

    with pytest.raises(UsageError, match=r"longer than the model's 10 tokens; /reset"):
        talk.ask("a question of more than ten tokens", lambda *_: None)
    assert talk.messages == []


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "base", vocabulary=300, tokenizer=True)
    (folder / "chat_template.jinja").unlink()

    assert call("chat", folder) == 2
    assert "no chat template" in capsys.readouterr().err


def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *arguments: object) -> str:
    """What `nexus chat` prints for lines on its standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert call("chat", *arguments, "--max-new-tokens", 6) == 0
    return capsys.readouterr().out


def test_over_a_pipe_every_line_is_a_turn_and_the_same_lines_give_the_same_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = pipe(monkeypatch, capsys, "hello\n\nand?\n", folder)

    talk = conversation(folder, max_new_tokens=6)
    answers = [talk.ask(text, lambda *_: None).answer for text in ("hello", "and?")]
    assert once == f"{answers[0]}\n\n{answers[1]}\n"
    assert pipe(monkeypatch, capsys, "hello\nand?\n/quit\nnever\n", folder) == once


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_not_utf8_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], errors: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))

    assert call("chat", folder) == 2
    assert "Error: standard input: is not UTF-8 text; save it as UTF-8" in capsys.readouterr().err


def test_the_base_of_a_converted_model_answers_as_the_base(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = tuple(LayerSelection(layer=layer, experts=(0, 1)) for layer in range(2))
    convert(open_checkpoint(folder), Selection(strategy="x", top_k=2, layers=layers), Convert(start=40.0), tmp_path)

    of_base = pipe(monkeypatch, capsys, "hello\n", folder)

    assert pipe(monkeypatch, capsys, "hello\n", tmp_path, "--base") == of_base
    assert pipe(monkeypatch, capsys, "hello\n", tmp_path) != of_base


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("plain text<|return|>", "", "plain text"),
        ("<|channel|>anal", "", ""),
        ("<|channel|>analysis<|message|>let me", "let me", ""),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "a", "b"),
        ("<|channel|>final<|message|>b", "", "b"),
        ("<|channel|>commentary to=functions.f <|message|>{}<|call|>", "{}", ""),
    ],
)
def test_a_harmony_reply_is_read_by_its_channels(text: str, thoughts: str, answer: str) -> None:
    assert reply_parts(text) == (thoughts, answer)
