"""The validate stage against an obvious loop over a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from command_line import call
from torch.nn import functional
from training_runs import train_settings, write_converted, write_texts

import nexus_core
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.cli.train import command as train_command
from nexus_core.cli.train import refuse_idle_processes
from nexus_core.cli.validate import command as validate_command
from nexus_core.data.documents import documents
from nexus_core.data.packing import pack
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.errors import DataError, UsageError
from nexus_core.recipe.schema import DeepSpeed, Source, Validate
from nexus_core.stages.validate import validate

SETTINGS = Validate(samples=7, sequence_length=24, batch_size=3)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A student that differs from its base: the shared experts start in full."""
    return write_converted(tmp_path_factory.mktemp("model"), start="full")


def test_numbers_are_those_of_a_loop_over_held_out_sequences(converted, tmp_path) -> None:
    sets = write_texts(tmp_path)
    metrics = validate(converted, sets, SETTINGS, ["domain"], tmp_path)
    tokenizer = load_tokenizer(converted.folder)
    model = nexus_core.load(converted, dtype=torch.float32)
    report = json.loads((tmp_path / "report.json").read_text())
    for name, sources in sets.items():
        held_out = documents(sources, "held_out", tokenizer)
        packed = pack(held_out, 24, end_token=end_token_id(tokenizer))
        assert len(packed) > 7
        nll = {"base": 0.0, "student": 0.0}
        tokens = 0
        for row in range(7):
            given = {"input_ids": packed.input_ids[row : row + 1], "position_ids": packed.positions[row : row + 1]}
            with torch.no_grad():
                outputs = {"student": model(**given, use_cache=False).logits[0]}
                with nexus_core.as_teacher(model):
                    outputs["base"] = model(**given, use_cache=False).logits[0]
            tokens += int((packed.targets[row] != -100).sum())
            for who, logits in outputs.items():
                nll[who] += float(functional.cross_entropy(logits, packed.targets[row], reduction="sum"))
        found = report["sets"][name]
        assert found["tokens"] == tokens
        assert found["sequences"] == 7
        for who in ("base", "student"):
            expected = nll[who] / tokens
            assert found[who]["nll_nats_per_token"] == pytest.approx(expected, rel=1e-5)
            assert found[who]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
            assert metrics[f"perplexity/{name}/{who}"] == found[who]["perplexity"]
        assert metrics[f"change/{name}"] == found["change"] != 0
    assert report["verdict"]["short"] == metrics["verdict"]
    assert set(report["verdict"]) >= {"retained", "gained", "text"}
    assert [layer["layer"] for layer in report["router"]["layers"]] == [0, 1]
    # The first router reads nothing that a shared expert has touched.
    assert report["router"]["layers"][0]["l1"] == 0 < report["router"]["layers"][1]["l1"]
    assert (tmp_path / "retention.png").stat().st_size > 5_000


def test_an_untouched_base_is_its_own_base(converted, tmp_path) -> None:
    base = open_checkpoint(converted.folder.parent / "base")
    metrics = validate(base, write_texts(tmp_path), SETTINGS, [], tmp_path)
    assert metrics["change/domain"] == metrics["change/general"] == metrics["router/l1"] == 0
    assert metrics["router/entropy"] == metrics["router/entropy_base"] > 0
    assert metrics["verdict"] == "retained"


def test_a_set_without_held_out_text_is_refused(converted, tmp_path) -> None:
    sources = [source.model_copy(update={"held_out": 0.0}) for source in write_texts(tmp_path)["domain"]]
    with pytest.raises(DataError, match="held_out"):
        validate(converted, {"domain": sources}, SETTINGS, [], tmp_path)


def test_more_sequences_than_there_are_means_all(converted, tmp_path) -> None:
    sets = {"general": [Source(path=write_texts(tmp_path)["general"][0].path)]}
    validate(converted, sets, SETTINGS.model_copy(update={"samples": 10**9}), [], tmp_path, part="all")
    found = json.loads((tmp_path / "report.json").read_text())["sets"]["general"]
    tokenizer = load_tokenizer(converted.folder)
    packed = pack(documents(sets["general"], "all", tokenizer), 24, end_token=end_token_id(tokenizer))
    assert found["tokens"] == packed.learnt_tokens


def test_the_commands_train_and_validate_whole_files(tmp_path) -> None:
    converted = write_converted(tmp_path)
    texts = {name: source[0].path for name, source in write_texts(tmp_path).items()}
    words = [
        *(str(converted.folder), "--learn", f"domain={texts['domain']}", "--keep", f"general={texts['general']}"),
        *("--steps", "3", "--learning-rate", "0.01", "--routing", "trainable", "--out", str(tmp_path / "trained")),
    ]
    overrides = ["--set", "sequence_length=24", "--set", "schedule.kind=constant", "--set", "data.domain=2.0"]
    answer = CliRunner().invoke(train_command, [*words, *overrides], catch_exceptions=False)
    assert answer.exit_code == 0
    assert "nexus validate" in answer.stdout
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {
        *("model", "metrics.jsonl", "checkpoints", "curves.png", "schedule.png")
    }

    words = [str(tmp_path / "trained" / "model"), "--data", f"domain={texts['domain']}", "--learnt", "domain"]
    words += ["--set", "sequence_length=24", "--out", str(tmp_path / "validated"), "--json"]
    answer = CliRunner().invoke(validate_command, words, catch_exceptions=False)
    metrics = json.loads(answer.stdout.splitlines()[-1])["metrics"]
    assert metrics["change/domain"] < 0
    assert metrics["verdict"] == "gained"


def test_the_validate_command_counts_no_tokens_that_nobody_asked_for(converted, tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("a few words of running text\n")
    assert call("validate", converted.folder, "--data", f"a={tmp_path / 'a.txt'}", "--out", tmp_path / "out") == 0
    (read,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("read ")]
    assert "/" not in read.split(" tokens ")[0]


def test_an_interrupted_train_command_goes_on_but_not_with_other_settings(tmp_path, monkeypatch) -> None:
    converted = write_converted(tmp_path)
    text = write_texts(tmp_path)["domain"][0].path
    out = tmp_path / "trained"

    def train(steps: int, *flags: str, exit_code: int = 0) -> None:
        words = [str(converted.folder), "--learn", f"domain={text}", "--steps", str(steps), "--out", str(out), *flags]
        overrides = ["--set", "sequence_length=24", "--set", "checkpoint_every=1"]
        answer = CliRunner().invoke(train_command, [*words, *overrides], catch_exceptions=False)
        assert answer.exit_code == exit_code

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nexus_core.stages.train.write_trained_model", crash)
        train(2, exit_code=1)
    partial = tmp_path / ".trained.partial"
    assert (partial / "checkpoints" / "step-000002").is_dir()
    for steps, flags in ((3, ()), (2, ("--held-out", "0.5"))):
        with pytest.raises(UsageError, match=r"left by an interrupted run with another model, data or settings"):
            train(steps, *flags)
    train(2)
    assert (out / "model").is_dir()
    assert not partial.exists()


def test_the_train_command_refuses_processes_that_would_have_nothing_to_do() -> None:
    settings = train_settings(batch_size=1, gradient_accumulation=2)
    refuse_idle_processes(settings, 2)
    with pytest.raises(
        UsageError, match=r"--processes 3: a step has 2 sequences to share \(batch_size 1 x gradient_acc"
    ):
        refuse_idle_processes(settings, 3)


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--zero-stage", "3"], DeepSpeed(zero_stage=3))])
def test_the_train_command_hands_its_zero_stage_to_deepspeed(converted, tmp_path, monkeypatch, flags, expected) -> None:
    given = []

    def train(*arguments: object, deepspeed: DeepSpeed | None, **rest: object) -> None:
        given.append(deepspeed)
        raise KeyboardInterrupt

    monkeypatch.setattr("nexus_core.stages.train.train", train)
    text = write_texts(tmp_path)["domain"][0].path
    words = [str(converted.folder), "--learn", f"domain={text}", "--out", str(tmp_path / "trained"), *flags]
    CliRunner().invoke(train_command, words)
    assert given == [expected]
