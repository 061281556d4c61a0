"""The generate stage: completions behind their prompts in order, the same bytes after an interruption."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gpt_oss_checkpoints import write_tiny_checkpoint
from prompt_files import read_records, write_questions
from training_runs import write_converted

import nexus_core
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.cli.generate import command as generate_command
from nexus_core.data.documents import documents
from nexus_core.data.prompts import read_prompts
from nexus_core.data.tokenizers import end_token_id, load_tokenizer, reply_end_ids
from nexus_core.errors import StageError, UsageError
from nexus_core.models import stated_end_ids
from nexus_core.recipe.schema import Generate, Records, Source
from nexus_core.stages import generate as stage
from nexus_core.stages.completions import Writing, complete
from nexus_core.stages.generate import generate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    return open_checkpoint(write_tiny_checkpoint(folder, vocabulary=320, tokenizer=True))


@pytest.fixture(scope="module")
def model(base: Checkpoint) -> Any:
    return nexus_core.load(base, dtype=torch.float32)


def settings(path: str, **changes: Any) -> Generate:
    return Generate.model_validate(
        {"prompts": [{"path": path}], "max_new_tokens": 6, "max_prompt_tokens": 200, "batch_size": 4} | changes
    )


def test_completions_stand_behind_their_prompts_in_order(base, model, tmp_path) -> None:
    metrics = generate(base, {"replies": settings(write_questions(tmp_path), samples=2)}, tmp_path)
    tokenizer = load_tokenizer(base.folder)
    ends = [*reply_end_ids(tokenizer, stated_end_ids(model)), end_token_id(tokenizer)]
    records = read_records(tmp_path / "replies.jsonl")
    assert len(records) == metrics["completions"] == 20 - metrics["empty"]
    report = json.loads((tmp_path / "report.json").read_text())["replies"]
    assert report["cut"] == metrics["cut"] == sum(not record["ended"] for record in records)
    assert report["prompts"][0]["records"] == report["prompts"][0]["documents"] == 10
    assert not (tmp_path / "chunks").exists()
    for record in records:
        turn = [{"role": "user", "content": record["asked"][0]}]
        said = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert record["prompt_tokens"] == tokenizer(said, add_special_tokens=False)["input_ids"]
        assert record["ended"] == (record["completion_tokens"][-1] in ends)
        assert len(record["completion_tokens"]) == 6 or record["ended"]
    asked = [record["asked"][0] for record in records]
    assert asked == sorted(asked, key=len)
    first = read_prompts([Records(path=write_questions(tmp_path))], tokenizer, 200)[0][0]
    assert records[0]["completion_tokens"] == complete(model, [first.tokens], [0], Writing(ends, 6))[0]
    assert records[1]["completion_tokens"] == complete(model, [first.tokens], [1], Writing(ends, 6))[0]


def test_the_seed_decides_and_the_batches_do_not(base, tmp_path) -> None:
    path, found = write_questions(tmp_path), {}
    for name, changes in {"a": {}, "b": {"batch_size": 3}, "c": {"seed": 1}}.items():
        (tmp_path / name).mkdir()
        generate(base, {"x": settings(path, **changes)}, tmp_path / name)
        found[name] = (tmp_path / name / "x.jsonl").read_bytes()
    assert found["a"] == found["b"] != found["c"]


def test_an_interrupted_job_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "CHUNK_COMPLETIONS", 4)
    path = write_questions(tmp_path, 18)
    wanted = {"x": settings(path), "y": settings(path, prompts=[{"path": path, "max_records": 3}], seed=1)}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    generate(base, wanted, whole)
    calls: list[int] = []

    def killed(*arguments: Any) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*arguments)

    monkeypatch.setattr(stage, "complete", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(base, wanted, broken)
    assert sorted(path.name for path in (broken / "chunks").iterdir()) == ["x-00000000.jsonl", "x-00000004.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(stage.shutil, "rmtree", lambda *_, **__: pytest.fail("killed before it was cleared away"))
        with pytest.raises(pytest.fail.Exception):
            generate(base, wanted, broken)
    assert len(calls) == 3 + 4  # of six chunks two were there
    assert generate(base, wanted, broken)["completions"] == 21
    assert len(calls) == 7
    assert not (broken / "chunks").exists()
    for name in ("x", "y"):
        assert (whole / f"{name}.jsonl").read_bytes() == (broken / f"{name}.jsonl").read_bytes()


def test_of_a_converted_model_the_base_in_it_writes(tmp_path) -> None:
    converted = write_converted(tmp_path / "models", start="full")
    path, found = write_questions(tmp_path), {}
    untouched = open_checkpoint(converted.folder.parent / "base")
    for name, (checkpoint, base) in {"a": (untouched, True), "b": (converted, True), "c": (converted, False)}.items():
        (tmp_path / name).mkdir()
        generate(checkpoint, {"x": settings(path)}, tmp_path / name, base=base)
        found[name] = (tmp_path / name / "x.jsonl").read_bytes()
    assert found["a"] == found["b"] != found["c"]


def test_a_harmony_reply_is_kept_with_its_channels(base, tmp_path, monkeypatch) -> None:
    tokenizer = load_tokenizer(base.folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|call|>"]})
    reply = (
        "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.find"
        '<|message|>{"name": "x"}<|call|>'
    )
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(stage, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(stage, "complete", lambda model, prompts, numbers, writing: [ids] * len(prompts))
    generate(base, {"x": settings(write_questions(tmp_path))}, tmp_path)
    found = documents([Source(path=str(tmp_path / "x.jsonl"))], "all", tokenizer)
    assert len(found) == 10
    for document in found:
        assert document.tokens[document.learns].tolist() == ids
        assert tokenizer.decode(document.tokens[document.learns]) == reply


def test_what_is_cut_or_empty_is_counted_and_said(base, tmp_path, monkeypatch, caplog) -> None:
    tokenizer = load_tokenizer(base.folder)
    end, letter = end_token_id(tokenizer), tokenizer("a", add_special_tokens=False)["input_ids"][0]
    replies = [[end], [letter] * 6, [letter, end], [letter] * 6]
    monkeypatch.setattr(stage, "complete", lambda model, prompts, numbers, writing: [replies[n] for n in numbers])
    metrics = generate(base, {"x": settings(write_questions(tmp_path, 4))}, tmp_path)
    assert {name: metrics[name] for name in ("completions", "cut", "empty")} == {"completions": 3, "cut": 2, "empty": 1}
    assert metrics["completion_tokens"] == 14
    assert "generate.x: 2 of 3 completions were cut at max_new_tokens 6" in caplog.text
    monkeypatch.setattr(stage, "complete", lambda model, prompts, numbers, writing: [[end]] * len(numbers))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(StageError, match=r"generate\.x: the model wrote nothing"):
        generate(base, {"x": settings(write_questions(tmp_path, 4))}, other)


def test_more_than_the_model_can_read_is_refused(base, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"max_new_tokens 131000 are more than the 131072 tokens"):
        generate(base, {"x": settings(write_questions(tmp_path), max_new_tokens=131_000)}, tmp_path)


def test_the_command_writes_a_file_that_is_a_source(base, tmp_path) -> None:
    words = [str(base.folder), "--prompts", write_questions(tmp_path), "--max-new-tokens", "5", "--set", "top_p=0.9"]
    words += ["--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(generate_command, words, catch_exceptions=False)
    assert answer.exit_code == 0
    assert "written     10 completions" in answer.stdout
    found = documents([Source(path=str(tmp_path / "out" / "completions.jsonl"))], "all", load_tokenizer(base.folder))
    assert len(found) == 10
    with pytest.raises(UsageError, match="is there already"):
        CliRunner().invoke(generate_command, words, catch_exceptions=False)
