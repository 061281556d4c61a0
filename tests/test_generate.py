"""Text that a model writes itself: drawn from its own distribution, kept as tokens, and a source like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from click.testing import CliRunner
from family_checkpoints import write_family_checkpoint
from gpt_oss_checkpoints import write_tiny_checkpoint
from training_runs import write_converted

import nexus_core
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.cli.generate import command as generate_command
from nexus_core.data.documents import documents
from nexus_core.data.generated import record_of
from nexus_core.data.prompts import read_prompts
from nexus_core.data.tokenizers import end_token_id, load_tokenizer, reply_end_ids
from nexus_core.errors import DataError, RecipeError, StageError, UsageError
from nexus_core.models import stated_end_ids
from nexus_core.pipeline.keys import data_identity
from nexus_core.pipeline.plan import Plan, plan_recipe
from nexus_core.pipeline.preflight import check_inputs
from nexus_core.pipeline.run import run_recipe
from nexus_core.recipe import load_recipe, recipe_from
from nexus_core.recipe.schema import Generate, Records, Source
from nexus_core.stages import generate as stage
from nexus_core.stages.completions import Writing, complete, draw
from nexus_core.stages.generate import generate

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_generated.yaml"
CHAT = byte_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    return open_checkpoint(write_tiny_checkpoint(folder, vocabulary=320, tokenizer=True))


@pytest.fixture(scope="module")
def model(base: Checkpoint) -> Any:
    return nexus_core.load(base, dtype=torch.float32)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def questions(folder: Path, count: int = 10) -> str:
    return write(folder / "prompts.jsonl", [{"prompt": f"What is {number}" + "?" * number} for number in range(count)])


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def settings(path: str, **changes: Any) -> Generate:
    return Generate.model_validate(
        {"prompts": [{"path": path}], "max_new_tokens": 6, "max_prompt_tokens": 200, "batch_size": 4} | changes
    )


# --- drawing --------------------------------------------------------------------------------------------------------


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    chances = (torch.arange(1000).double() + 0.5) / 1000
    drawn = draw(probabilities.log().expand(1000, -1), chances, temperature=1.0)
    assert torch.bincount(drawn, minlength=5).tolist() == [500, 0, 300, 200, 0]
    edges = torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)
    assert draw(probabilities.log().expand(2, -1), edges, temperature=1.0).tolist() == [0, 3]


def test_temperature_and_top_p_do_what_they_say() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1000, -1)
    chances = (torch.arange(1000).double() + 0.5) / 1000
    squared = np.array([25, 9, 4]) / 38
    halved = torch.bincount(draw(logits, chances, temperature=0.5), minlength=3)
    np.testing.assert_allclose(halved / 1000, squared, atol=1e-3)
    assert torch.bincount(draw(logits, chances, 1.0, top_p=0.7), minlength=3).tolist() == [625, 375, 0]
    assert set(draw(logits, chances, 1.0, top_p=0.5).tolist()) == {0}


# --- writing --------------------------------------------------------------------------------------------------------


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 262, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_different_lengths_are_completed_together_as_each_alone(model, temperature) -> None:
    # The sliding window is 128 tokens.
    prompts, writing = prompts_of(3, 40, 150, 127), Writing([2], 20, temperature, seed=5)
    together = complete(model, prompts, range(4), writing)
    alone = [complete(model, [prompt], [number], writing)[0] for number, prompt in enumerate(prompts)]
    assert together == alone
    assert len({tuple(completion) for completion in together}) == 4


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_other_families_complete_prompts_together_as_each_alone(family, tmp_path) -> None:
    other = nexus_core.load(write_family_checkpoint(tmp_path / family, family), dtype=torch.float32)
    prompts, writing = prompts_of(3, 40, 17), Writing([319], 8, seed=1)
    together = complete(other, prompts, range(3), writing)
    assert together == [complete(other, [prompt], [row], writing)[0] for row, prompt in enumerate(prompts)]


def test_it_writes_what_whole_passes_without_a_cache_would(model) -> None:
    prompt = prompts_of(120)[0]
    writing = Writing([2], 16, 0.8, 0.9, seed=3)
    tokens = list(prompt)
    for chance in writing.chances(7):
        with torch.no_grad():
            positions = torch.arange(len(tokens))[None]
            logits = model(input_ids=torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[:, -1]
        tokens.append(int(draw(logits, torch.tensor([chance]), 0.8, 0.9)))
        if tokens[-1] == 2:
            break
    assert complete(model, [prompt], [7], writing)[0] == tokens[len(prompt) :]


def test_a_completion_ends_with_its_first_end_token(model) -> None:
    prompt = prompts_of(30)[0]
    free = complete(model, [prompt], [0], Writing([319], 12))[0]
    assert len(free) == 12
    ended = complete(model, [prompt, *prompts_of(50)], [0, 1], Writing([free[4], 319], 12))
    assert ended[0] == free[: free.index(free[4]) + 1]


def test_a_checkpoints_own_generation_settings_are_not_used(model) -> None:
    prompt, writing = prompts_of(30)[0], Writing([2], 12)
    expected = complete(model, [prompt], [0], writing)
    brought = model.generation_config
    model.generation_config = type(brought)(repetition_penalty=50.0, top_k=1, min_new_tokens=3, eos_token_id=5)
    try:
        assert complete(model, [prompt], [0], writing) == expected
        assert model.generation_config.repetition_penalty == 50.0
    finally:
        model.generation_config = brought


# --- the stage's work -----------------------------------------------------------------------------------------------


def test_completions_stand_behind_their_prompts_in_order(base, model, tmp_path) -> None:
    metrics = generate(base, {"replies": settings(questions(tmp_path), samples=2)}, tmp_path)
    tokenizer = load_tokenizer(base.folder)
    ends = [*reply_end_ids(tokenizer, stated_end_ids(model)), end_token_id(tokenizer)]
    records = read(tmp_path / "replies.jsonl")
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
    first = read_prompts([Records(path=questions(tmp_path))], tokenizer, 200)[0][0]
    assert records[0]["completion_tokens"] == complete(model, [first.tokens], [0], Writing(ends, 6))[0]
    assert records[1]["completion_tokens"] == complete(model, [first.tokens], [1], Writing(ends, 6))[0]


def test_the_seed_decides_and_the_batches_do_not(base, tmp_path) -> None:
    path, found = questions(tmp_path), {}
    for name, changes in {"a": {}, "b": {"batch_size": 3}, "c": {"seed": 1}}.items():
        (tmp_path / name).mkdir()
        generate(base, {"x": settings(path, **changes)}, tmp_path / name)
        found[name] = (tmp_path / name / "x.jsonl").read_bytes()
    assert found["a"] == found["b"] != found["c"]


def test_an_interrupted_job_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "CHUNK_COMPLETIONS", 4)
    path = questions(tmp_path, 18)
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


def test_two_processes_write_what_one_does(base, tmp_path, monkeypatch) -> None:
    domain = write(tmp_path / "domain.jsonl", [{"text": "some words"}])
    prompts = questions(tmp_path, 70)  # two chunks
    value = {
        "schema": 1,
        "model": {"path": str(base.folder)},
        "generate": {"replies": {"prompts": [{"path": prompts}], "max_new_tokens": 3}},
        "data": {"domain": [{"path": domain}], "general": [{"path": "generated:replies"}]},
        "run": {"device": "cpu", "tracking": {"enabled": False}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(value))
    one = run_recipe(
        load_recipe(tmp_path / "recipe.yaml", [f"run.store={tmp_path / 'one'}"]), until="generate"
    ).outcome("generate")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--until", "generate", "--processes", "2", "--set", f"run.store={tmp_path / 'two'}"]
    command = [sys.executable, "-m", "nexus_core", "run", str(tmp_path / "recipe.yaml"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two" / "generate" / one.key
    for name in ("replies.jsonl", "report.json"):
        assert (two / name).read_bytes() == (one.path / name).read_bytes()
    assert len(read(two / "replies.jsonl")) == one.metrics["completions"] > 64


def test_of_a_converted_model_the_base_in_it_writes(tmp_path) -> None:
    converted = write_converted(tmp_path / "models", start="full")
    path, found = questions(tmp_path), {}
    untouched = open_checkpoint(converted.folder.parent / "base")
    for name, (checkpoint, base) in {"a": (untouched, True), "b": (converted, True), "c": (converted, False)}.items():
        (tmp_path / name).mkdir()
        generate(checkpoint, {"x": settings(path)}, tmp_path / name, base=base)
        found[name] = (tmp_path / name / "x.jsonl").read_bytes()
    assert found["a"] == found["b"] != found["c"]


def test_what_is_cut_or_empty_is_counted_and_said(base, tmp_path, monkeypatch, caplog) -> None:
    tokenizer = load_tokenizer(base.folder)
    end, letter = end_token_id(tokenizer), tokenizer("a", add_special_tokens=False)["input_ids"][0]
    replies = [[end], [letter] * 6, [letter, end], [letter] * 6]
    monkeypatch.setattr(stage, "complete", lambda model, prompts, numbers, writing: [replies[n] for n in numbers])
    metrics = generate(base, {"x": settings(questions(tmp_path, 4))}, tmp_path)
    assert {name: metrics[name] for name in ("completions", "cut", "empty")} == {"completions": 3, "cut": 2, "empty": 1}
    assert metrics["completion_tokens"] == 14
    assert "generate.x: 2 of 3 completions were cut at max_new_tokens 6" in caplog.text
    monkeypatch.setattr(stage, "complete", lambda model, prompts, numbers, writing: [[end]] * len(numbers))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(StageError, match=r"generate\.x: the model wrote nothing"):
        generate(base, {"x": settings(questions(tmp_path, 4))}, other)


def test_more_than_the_model_can_read_is_refused(base, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"max_new_tokens 131000 are more than the 131072 tokens"):
        generate(base, {"x": settings(questions(tmp_path), max_new_tokens=131_000)}, tmp_path)


# --- prompts --------------------------------------------------------------------------------------------------------


def said(prompts: list[Any], tokenizer: Any = CHAT) -> list[str]:
    return [tokenizer.decode(prompt.tokens) for prompt in prompts]


def test_prompts_are_given_up_to_where_the_answer_begins(tmp_path) -> None:
    user, answer = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
    path = write(
        tmp_path / "chats.jsonl",
        [{"messages": turns} for turns in ([user], [user, answer], [user, answer, user], [answer], [])],
    )
    prompts, (report,) = read_prompts([Records(path=path)], CHAT, 200)
    opened = "<|start|>user<|message|>a?<|end|><|start|>assistant<|message|>"
    longer = f"{opened}b<|end|>{opened}"
    assert said(prompts) == [opened, opened, longer]
    assert [prompt.asked for prompt in prompts] == [["a?"]] * 3
    assert (report.records, report.documents, report.missing_prompt, report.unreadable) == (5, 3, 1, 1)


def test_prompts_need_no_response_and_may_have_one(tmp_path) -> None:
    rows = [{"question": "a?", "answer": "b"}, {"question": " ", "answer": "b"}, {"question": "c?", "answer": "d"}]
    path = write(tmp_path / "rows.jsonl", rows)
    prompts, (report,) = read_prompts([Records(path=path)], byte_tokenizer(), 200)
    assert said(prompts) == ["a?\n", "c?\n"]
    assert report.missing_prompt == 1


def test_long_prompts_are_left_out_and_long_text_is_begun(tmp_path) -> None:
    asking = write(tmp_path / "asking.jsonl", [{"prompt": "a" * 200}, {"prompt": "b"}])
    text = write(tmp_path / "text.jsonl", [{"text": "c" * 200}])
    prompts, (one, other) = read_prompts([Records(path=asking), Records(path=text)], CHAT, 100)
    assert said(prompts)[1:] == ["c" * 100]
    assert [prompt.continues_text for prompt in prompts] == [False, True]
    assert (one.too_long, one.documents, other.oversize, other.documents) == (1, 1, 1, 1)


def test_sources_without_prompts_are_refused(tmp_path) -> None:
    for rows, problem in (
        ([{"prompt": "-"}], "none of its 1 records is a prompt: 1 without a prompt"),
        ([{"body": "a"}], "has the fields body, which fit no format"),
        ([{"prompt_tokens": [1], "completion_tokens": [2]}], "which fit no format"),
    ):
        with pytest.raises(DataError, match=problem):
            read_prompts([Records(path=write(tmp_path / "rows.jsonl", rows))], CHAT, 100)
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match="prompts cannot be read in the format 'generated'"):
        read_prompts([Records(path=path, format="generated")], CHAT, 100)


# --- as a data source -----------------------------------------------------------------------------------------------


def tokens(text: str) -> list[int]:
    return CHAT(text, add_special_tokens=False)["input_ids"]


def test_the_very_tokens_come_back_and_the_completion_is_learnt(tmp_path) -> None:
    # Bytes that are no text and letters that another tokenization would join: only ids say which they were.
    prompt, completion = tokens("<|start|>user<|message|>a<|end|><|start|>assistant<|message|>"), tokens("b<|return|>")
    odd = [*tokens("x")[:1], 128, 255, *completion]
    rows = [
        record_of(["a"], prompt, completion, CHAT, ended=True, continues_text=False),
        record_of(["b"], prompt, odd, CHAT, ended=True, continues_text=False),
        record_of(["c"], tokens("run"), tokens("ning<|endoftext|>"), CHAT, ended=True, continues_text=True),
        record_of(["d"], tokens("run"), tokens("nin"), CHAT, ended=False, continues_text=True),
    ]
    found = documents([Source(path=write(tmp_path / "x.jsonl", rows))], "all", CHAT)
    assert found.report[0].format == "generated"
    by_tokens = {tuple(document.tokens.tolist()): document for document in found}
    assert len(by_tokens) == 4
    for wanted in (completion, odd):
        chat = by_tokens[*prompt, *wanted]
        assert chat.learns.tolist() == [False] * len(prompt) + [True] * len(wanted)
        assert not chat.learns_end  # the mark that the model ended with is learnt instead
    assert by_tokens[tuple(tokens("running"))].learns.all()
    assert by_tokens[tuple(tokens("running"))].learns_end
    assert by_tokens[tuple(tokens("runnin"))].learns.all()
    assert not by_tokens[tuple(tokens("runnin"))].learns_end


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
    generate(base, {"x": settings(questions(tmp_path))}, tmp_path)
    found = documents([Source(path=str(tmp_path / "x.jsonl"))], "all", tokenizer)
    assert len(found) == 10
    for document in found:
        assert document.tokens[document.learns].tolist() == ids
        assert tokenizer.decode(document.tokens[document.learns]) == reply


def test_tokens_of_another_tokenizer_are_left_out(tmp_path) -> None:
    row = record_of(["a"], tokens("a"), tokens("b"), CHAT, ended=False, continues_text=False)
    good, moved, unknown, no_ids = row, row | {"completion_tokens": tokens("c")}, row | {"prompt_tokens": [10**7]}, {}
    no_ids = row | {"completion_tokens": "b"}
    found = documents([Source(path=write(tmp_path / "x.jsonl", [good, moved, unknown, no_ids]))], "all", CHAT)
    assert (found.report[0].documents, found.report[0].unreadable) == (1, 3)
    assert "another model's tokenizer" in found.report[0].first_problem


def test_a_question_and_what_the_base_writes_to_it_lie_on_the_same_side(tmp_path) -> None:
    asked = write(tmp_path / "asked.jsonl", [{"prompt": f"q {n}?", "response": "r"} for n in range(200)])
    prompts, _ = read_prompts([Records(path=asked)], CHAT, 100)
    rows = [record_of(p.asked, p.tokens, tokens("b"), CHAT, ended=False, continues_text=False) for p in prompts]
    written = write(tmp_path / "written.jsonl", rows)

    def sides(path: str) -> set[str]:
        found = documents([Source(path=path, held_out=0.4)], "held_out", CHAT)
        return {CHAT.decode(document.tokens).split("<|message|>")[1] for document in found}

    assert sides(asked) == sides(written)
    assert 50 < len(sides(asked)) < 110


# --- in a recipe ----------------------------------------------------------------------------------------------------


def recipe_over(base: Checkpoint, folder: Path, *overrides: str, **changes: Any) -> Any:
    if not (folder / "domain.jsonl").exists():
        write(folder / "domain.jsonl", [{"text": f"some words {n}" * 5} for n in range(60)])
        questions(folder, 40)
    value = {
        "schema": 1,
        "model": {"path": str(base.folder)},
        "generate": {"replies": {"prompts": [{"path": str(folder / "prompts.jsonl")}], "max_new_tokens": 6}},
        "data": {
            "domain": [{"path": str(folder / "domain.jsonl")}],
            "general": [{"path": "generated:replies", "held_out": 0.3}],
        },
        "run": {"store": str(folder / "runs"), "device": "cpu", "tracking": {"enabled": False}},
    }
    return recipe_from(value | changes, overrides=overrides)


def keys(plan: Plan) -> dict[str, str]:
    return {step.stage.name: step.key for step in plan.steps}


def test_the_key_is_made_of_prompts_model_and_settings_and_only_readers_follow(base, tmp_path) -> None:
    only_domain = "collect.data={domain: 1.0}"
    before = keys(plan_recipe(recipe_over(base, tmp_path, only_domain)))
    assert list(before) == ["generate", "collect", "select", "convert", "train", "validate"]
    moved = keys(plan_recipe(recipe_over(base, tmp_path, only_domain, "train.max_steps=7")))
    assert moved["generate"] == before["generate"]
    other = keys(plan_recipe(recipe_over(base, tmp_path, only_domain, "generate.replies.temperature=0.5")))
    changed = {name for name in before if before[name] != other[name]}
    assert changed == {"generate", "train", "validate"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "another?"}) + "\n")
    data_identity.cache_clear()
    other = keys(plan_recipe(recipe_over(base, tmp_path, only_domain)))
    assert {name for name in before if before[name] != other[name]} == {"generate", "train", "validate"}
    everything = plan_recipe(recipe_over(base, tmp_path))
    assert next(step for step in everything.steps if step.stage.name == "collect").stage.inputs == ("generate",)


def test_until_collect_nothing_is_written_that_it_does_not_read(base, tmp_path) -> None:
    found = plan_recipe(recipe_over(base, tmp_path, "collect.data={domain: 1.0}"), until="collect")
    assert list(keys(found)) == ["collect"]
    assert list(keys(plan_recipe(recipe_over(base, tmp_path), until="collect"))) == ["generate", "collect"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"generate": {}}, "data.general.0.path: there is no section under generate called 'replies'"),
        (
            {"data": {"domain": [{"path": "generated:replys"}]}},
            "there is no section under generate called 'replys'; did you mean 'replies'?",
        ),
        (
            {"data": {"domain": [{"path": "x.txt"}]}},
            "generate.replies: is read by no data set; write 'path: generated:replies' under data, or remove it",
        ),
        ({"generate": {"a b": {"prompts": [{"path": "x.txt"}]}}}, "is made of letters, digits, '_' and '-' only"),
        ({"generate": {"replies": {"prompts": []}}}, "generate.replies.prompts"),
        ({"generate": {"replies": {"prompts": [{"path": "x", "weight": 1.0}]}}}, "unknown key"),
    ],
)
def test_what_does_not_fit_together_is_told(base, tmp_path, changes, problem) -> None:
    with pytest.raises(RecipeError) as found:
        recipe_over(base, tmp_path, **changes)
    assert problem in str(found.value)


def test_prompts_that_are_not_there_are_told_before_anything_runs(base, tmp_path) -> None:
    recipe = recipe_over(base, tmp_path, "generate.replies.prompts.0.path=nowhere.jsonl")
    with pytest.raises(RecipeError, match=r"generate\.replies\.prompts\.0: nowhere\.jsonl: there is no such file"):
        check_inputs(recipe, base)
    check_inputs(recipe_over(base, tmp_path), base)


def test_the_shipped_recipe_runs_and_every_stage_reads_what_was_written(tmp_path) -> None:
    written = ("replies", "continuations")
    small = [
        *("replies.prompts.0.max_records=20", "replies.max_new_tokens=6", "continuations.prompts.0.max_records=16"),
        *("continuations.prompts.1.max_records=16", "continuations.max_new_tokens=6"),
    ]
    overrides = [
        *(f"generate.{assignment}" for assignment in small),
        f"data.general=[{', '.join(f'{{path: generated:{name}, held_out: 0.3}}' for name in written)}]",
        *("collect.tokens=600", "collect.sequence_length=64", "train.max_steps=2", "train.sequence_length=32"),
        *("train.batch_size=2", "train.teacher.kind=offline", "validate.samples=4", "validate.sequence_length=32"),
        *(f"run.store={tmp_path / 'runs'}", "run.tracking.enabled=false", "run.device=cpu"),
    ]
    result = run_recipe(load_recipe(RECIPE, overrides))
    counts = result.outcome("generate").metrics
    assert counts["completions"] + counts["empty"] == 52
    assert result.outcome("capture").metrics["kept_tokens"] > 0
    report = json.loads((result.outcome("collect").path / "sampling_report.json").read_text())
    assert [source["format"] for source in report["sets"]["general"]["sources"]] == ["generated", "generated"]
    kept = json.loads((result.outcome("validate").path / "report.json").read_text())["sets"]["general"]
    assert kept["tokens"] > 0
    again = run_recipe(load_recipe(RECIPE, overrides))
    assert all(outcome.reused for outcome in again.outcomes)


def test_the_command_writes_a_file_that_is_a_source(base, tmp_path) -> None:
    words = [str(base.folder), "--prompts", questions(tmp_path), "--max-new-tokens", "5", "--set", "top_p=0.9"]
    words += ["--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(generate_command, words, catch_exceptions=False)
    assert answer.exit_code == 0
    assert "written     10 completions" in answer.stdout
    found = documents([Source(path=str(tmp_path / "out" / "completions.jsonl"))], "all", load_tokenizer(base.folder))
    assert len(found) == 10
    with pytest.raises(UsageError, match="is there already"):
        CliRunner().invoke(generate_command, words, catch_exceptions=False)
