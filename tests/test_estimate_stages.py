"""Estimates of single stages: text that the base writes, another teacher, averages with an earlier state."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from live_tensors import LiveTensors
from nexus_gpt_oss import synthetic
from workloads import RECIPES, workload

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.estimate import Device, ModelSize, Prompts, find_device, remedies
from nexus_core.estimate.disk import stage_disk
from nexus_core.estimate.memory import stage_memory
from nexus_core.estimate.work import stage_work
from nexus_core.estimate.workload import Completions, Passes
from nexus_core.models import load
from nexus_core.pipeline.preflight import look_ahead, model_size
from nexus_core.recipe.load import load_recipe
from nexus_core.stages.completions import Writing, complete


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return open_checkpoint("embedded:tiny-gpt-oss")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelSize:
    folder = tmp_path_factory.mktemp("120b")
    (folder / "config.json").write_text(json.dumps(synthetic.config("120b")))
    return model_size(open_checkpoint(folder), "cuda")


@pytest.mark.parametrize(("batch", "prompt", "new"), [(16, 128, 3), (64, 4, 24)])
def test_writing_text_holds_what_was_estimated(tiny: Checkpoint, batch: int, prompt: int, new: int) -> None:
    model = load(tiny, dtype=torch.float32)
    prompts = [[token + row for token in range(300, 300 + prompt)] for row in range(batch)]
    writing = Writing([0], new)
    complete(model, [[300, 301]], [0], Writing([0], 2))  # what is made once is there after the first
    with LiveTensors() as tensors:
        complete(model, prompts, range(batch), writing)
    text = Completions("text", Prompts(batch, prompt, prompt), batch, batch, new)
    work = replace(workload("tiny.yaml", kind="cpu"), generate=(text,))
    # On a GPU the moments are told apart from what is held all the time; what they take is the same.
    parts = stage_memory(model_size(tiny, "cpu"), work, "cuda")["generate"].parts
    held = {name: count for name, count in parts.items() if name not in ("packed experts", "other weights")}
    assert sum(held.values()) == pytest.approx(tensors.peak_bytes, rel=0.15)


def test_writing_text_is_counted_token_by_token(large: ModelSize) -> None:
    device = Device("paper", "cuda", 150_000_000_000, 3e12, 400e12)
    text = Completions("text", Prompts(160, 1024, 1024), 160, 16, 512)
    work = replace(workload("gpt_oss_pca_top24.yaml"), generate=(text,))
    found = stage_work(large, work, device)["generate"]
    assert found.tokens == 160 * 512
    # Ten batches of 512 passes, of which each decodes the experts that 16 tokens use: four tenths of them.
    used = 1 - (1 - 4 / 128) ** 16
    each = used * (large.costs.packed_bytes + 2 * 2 * large.costs.decoded_numbers) + 2 * large.costs.held_numbers
    assert found.moved_bytes == pytest.approx(10 * 512 * each, rel=0.05)
    assert found.moved_bytes / 3e12 < found.seconds < 1.2 * found.moved_bytes / 3e12
    halved = stage_work(large, replace(work, processes=2), device)["generate"]
    assert halved.seconds == pytest.approx(found.seconds / 2)


def test_a_cpu_takes_its_time_between_products_and_for_calling_them(tiny: Checkpoint) -> None:
    model, work = model_size(tiny, "cpu"), workload("tiny.yaml", kind="cpu")
    endless = Device("endless", "cpu", 10**10, math.inf, math.inf)
    # One token at a time: four layers, and four experts in each.
    text = Completions("text", Prompts(1, 8, 8), 1, 1, 100)
    written = stage_work(model, replace(work, generate=(text,)), endless)["generate"]
    assert written.seconds == pytest.approx(100 * (4 * 2.3e-3 + 16 * 2e-4))
    # Measured on one core of the machine that the constants are from: 0.41 s for 2,048 tokens.
    core = replace(endless, bandwidth=21e9, flops=52e9)
    passes = replace(work, collect=Passes(2048, 8, 256))
    assert 0.25 < stage_work(model, passes, core)["collect"].seconds < 0.6
    assert stage_work(model, passes, replace(core, kind="cuda"))["collect"].seconds < 0.1


def test_a_recipe_that_has_text_written_is_estimated_by_its_prompts(tiny: Checkpoint) -> None:
    recipe = load_recipe(RECIPES / "tiny_generated.yaml")
    ahead = look_ahead(recipe, tiny, "h200")
    assert next(iter(ahead.stages)) == "generate"
    replies, continuations = ahead.work.generate
    assert (replies.count, replies.new) == (100, 48)
    assert (continuations.count, continuations.prompts.longest) == (200, 32)
    assert ahead.stages["generate"].work.tokens == 100 * 48 + 200 * 96
    assert 0 < ahead.stages["generate"].disk_bytes < 10_000_000
    few = load_recipe(RECIPES / "tiny_generated.yaml", ["generate.replies.prompts.0.max_records=3"])
    assert look_ahead(few, tiny, "h200").work.generate[0].batch == 3
    # To refuse what does not fit, nobody counts records.
    assert look_ahead(few, tiny, "h200", timed=False).work.generate[0].batch == 16
    assert "generate" not in look_ahead(load_recipe(RECIPES / "tiny.yaml"), tiny, "h200").stages


def test_prompts_that_nobody_can_count_are_told(tiny: Checkpoint) -> None:
    source = "generate.replies.prompts.0"
    elsewhere = [f"{source}.path=somebody/questions"]
    counted = look_ahead(load_recipe(RECIPES / "tiny_generated.yaml", elsewhere), tiny, "h200")
    assert counted.notes == ()
    assert counted.work.generate[0].prompts == Prompts(100, 1024, 1024)
    elsewhere.append(f"{source}.max_records=null")
    uncounted = look_ahead(load_recipe(RECIPES / "tiny_generated.yaml", elsewhere), tiny, "h200")
    assert (uncounted.work.generate[0].count, uncounted.work.generate[0].batch) == (0, 16)
    assert "generate.replies: how many records somebody/questions has" in uncounted.notes[0]


def test_fewer_completions_at_a_time_are_a_way_out(large: ModelSize) -> None:
    text = Completions("answers", Prompts(100, 1024, 1024), 100, 512, 512)
    work = replace(workload("gpt_oss_pca_top24.yaml"), generate=(text,))
    device = find_device("h100")
    needs = stage_memory(large, work, "cuda")["generate"].device_bytes
    assert needs > device.available_bytes
    (first, *_) = remedies(large, work, device, 0, "generate", "device")
    assert first.settings[0].startswith("generate.answers.batch_size=")
    assert first.needs_bytes <= device.available_bytes


def test_another_teacher_is_counted_where_it_is_captured(tiny: Checkpoint, large: ModelSize) -> None:
    model = model_size(tiny, "cuda")
    work = replace(workload("tiny.yaml"), teacher="offline")
    taught = replace(model, teacher=large)
    alone, beside = (stage_memory(each, work, "cuda") for each in (model, taught))
    assert beside["capture"].parts["packed experts"] == large.costs.packed_bytes
    assert beside["train"] == alone["train"]
    device = find_device("h200")
    of_teacher, of_base = (stage_work(each, work, device) for each in (taught, model))
    assert of_teacher["capture"].flops > 100 * of_base["capture"].flops
    assert of_teacher["train"] == of_base["train"]


def test_products_that_a_cpu_compiles_count_wherever_the_model_runs_in_bfloat16(large: ModelSize) -> None:
    text = Completions("text", Prompts(8, 64, 64), 8, 8, 16)
    work = replace(workload("gpt_oss_pca_top24.yaml"), generate=(text,), teacher="offline")
    for kind, number_bytes, stages in (
        ("cpu", 2, {"generate", "collect", "capture", "train", "validate"}),
        ("cpu", 4, set()),
        ("cuda", 2, set()),
    ):
        memory = stage_memory(large, replace(work, number_bytes=number_bytes), kind)
        assert {name for name, parts in memory.items() if parts.host.get("compiled products")} == stages
    # A pass of 16,384 tokens has more shapes than the library keeps.
    assert stage_memory(large, work, "cpu")["collect"].host["compiled products"] == 1024 * 680_000


def test_every_process_keeps_a_whole_anchor_in_the_machines_memory(large: ModelSize) -> None:
    work = workload("gpt_oss_pca_top24.yaml", "train.anchor={interval: 10, alpha: 0.5}")
    anchor = 4 * large.shared_numbers(None)
    for count, stage in ((1, 0), (4, 0), (4, 2)):
        memory = stage_memory(large, replace(work, processes=count, zero_stage=stage), "cuda")["train"]
        assert "anchor" not in memory.parts
        assert memory.host["anchor"] == count * anchor
    without = replace(work, anchors=False)
    assert "anchor" not in stage_memory(large, without, "cuda")["train"].host
    # Every checkpoint has one, and the newest is written before the oldest goes.
    more = stage_disk(large, work)["train"] - stage_disk(large, without)["train"]
    assert more == (work.checkpoints + 1) * anchor


def test_a_process_computes_its_share_of_a_step() -> None:
    work = workload("gpt_oss_pca_top24.yaml", "train.batch_size=4", "train.gradient_accumulation=2")
    shares = {count: replace(work, processes=count) for count in (1, 2, 3, 4, 8)}
    found = {count: (share.own_accumulation, share.own_train.batch) for count, share in shares.items()}
    assert found == {1: (2, 4), 2: (1, 4), 3: (1, 3), 4: (1, 2), 8: (1, 1)}
