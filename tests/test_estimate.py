"""What a recipe is said to take: the budget on paper, what live tensors show, what to change, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from live_tensors import LiveTensors
from nexus_gpt_oss import costs, synthetic
from nexus_gpt_oss.backends import grouped, rows, sorted_rows
from workloads import RECIPES, workload

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import UsageError
from nexus_core.estimate import Device, estimate_stages, find_device, remedies, training
from nexus_core.estimate.devices import CONTEXT_BYTES, recognise
from nexus_core.estimate.memory import stage_memory
from nexus_core.estimate.model import plain_costs
from nexus_core.estimate.work import stage_work
from nexus_core.estimate.workload import Passes
from nexus_core.models import load
from nexus_core.pipeline import preflight
from nexus_core.pipeline.preflight import look_ahead, model_size
from nexus_core.recipe.load import load_recipe
from nexus_core.train import float32_masters
from nexus_core.train.engines import deepspeed_library

# What the budget on paper counts on: effective rates of an H200, nothing taken off for being a data sheet's.
PAPER = Device("paper", "cuda", 150_000_000_000, 3e12, 400e12)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoint]:
    """Checkpoints of the published shapes that have nothing but their config."""
    found = {}
    for shape in ("20b", "120b"):
        folder = tmp_path_factory.mktemp(shape)
        (folder / "config.json").write_text(json.dumps(synthetic.config(shape)))
        found[shape] = open_checkpoint(folder)
    return found


@pytest.mark.parametrize(("tokens", "expected"), [(1_024, 1_250), (4_096, 3_400), (8_192, 4_800), (16_384, 6_000)])
def test_training_120b_takes_the_time_of_the_budget_on_paper(
    shapes: Mapping[str, Checkpoint], tokens: int, expected: int
) -> None:
    work = workload("gpt_oss_pca_top24.yaml", f"train.batch_size={tokens // 1024}", "train.gradient_checkpointing=true")
    train = stage_work(model_size(shapes["120b"], "cuda"), replace(work, kept_share=0.25), PAPER)["train"]
    assert train.tokens_per_second == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("tokens", "expected"), [(8_192, 19_500), (16_384, 24_600), (32_768, 28_300)])
def test_collecting_from_120b_takes_the_time_of_the_budget_on_paper(
    shapes: Mapping[str, Checkpoint], tokens: int, expected: int
) -> None:
    work = workload("gpt_oss_pca_top24.yaml", f"collect.batch_size={tokens // 512}")
    collect = stage_work(model_size(shapes["120b"], "cuda"), work, PAPER)["collect"]
    assert collect.tokens_per_second == pytest.approx(expected, rel=0.25)


def test_weights_in_memory_are_the_bytes_on_disk_where_both_are_bfloat16(shapes: Mapping[str, Checkpoint]) -> None:
    for checkpoint in shapes.values():
        model = model_size(checkpoint, "cuda")
        assert model.costs.packed_bytes + 2 * model.costs.held_numbers == sum(model.stored_bytes.values())


def test_120b_trains_in_85_gb_and_in_76_with_its_optimizer_offloaded(shapes: Mapping[str, Checkpoint]) -> None:
    model = model_size(shapes["120b"], "cuda")
    work = workload("gpt_oss_pca_top24.yaml", "train.batch_size=8", "train.gradient_accumulation=1")
    assert work.own_train.batch_tokens == 8 * 1024
    memory = stage_memory(model, work, "cuda")["train"]
    weights = sum(memory.parts[name] for name in ("packed experts", "other weights", "shared experts"))
    assert weights == pytest.approx(67.0e9, rel=0.01)
    # A remainder of 16 bits and two moments, where a whole float32 master would make it 12 bytes a number.
    assert memory.parts["optimizer states"] == 10 * model.shared_numbers(None)
    assert memory.device_bytes < 85e9
    offloaded = stage_memory(model, replace(work, offload="optimizer", zero_stage=2), "cuda")["train"]
    assert offloaded.device_bytes < 76e9


def test_20b_trains_in_24_gb(shapes: Mapping[str, Checkpoint]) -> None:
    model, device = model_size(shapes["20b"], "cuda"), find_device("rtx-4090")
    work = workload("gpt_oss_20b_pca.yaml", "train.batch_size=4", "train.gradient_accumulation=1")
    needs = stage_memory(model, work, "cuda")["train"].device_bytes
    assert needs < 24e9
    assert needs < device.available_bytes


def test_gradients_take_the_place_of_activations(shapes: Mapping[str, Checkpoint]) -> None:
    model = model_size(shapes["120b"], "cuda")
    work = workload("gpt_oss_pca_top24.yaml", "train.gradient_accumulation=1")
    once = stage_memory(model, work, "cuda")["train"].moments
    numbers = model.shared_numbers(None)
    assert "gradients" not in once["vocabulary"]
    assert once["step"]["gradients"] == 2 * numbers
    # From the second micro-batch on they are sums, in float32, and there all the time.
    twice = stage_memory(model, replace(work, accumulation=2), "cuda")["train"].moments
    assert twice["vocabulary"]["gradients"] == twice["step"]["gradients"] == 4 * numbers


@pytest.mark.parametrize(("batch", "length"), [(8, 256), (64, 16)])
def test_a_forward_pass_holds_what_was_estimated(batch: int, length: int) -> None:
    checkpoint = open_checkpoint("embedded:tiny-gpt-oss")
    model = load(checkpoint, dtype=torch.float32)
    input_ids = torch.arange(batch * length).view(batch, length) % 2000
    positions = torch.arange(length).expand(batch, -1)
    work = replace(
        workload("tiny.yaml", kind="cpu"), collect=Passes(batch * length, batch, length), keep_inputs=0, data_sets=1
    )
    for _ in range(2):  # what is made once is there after the first
        with torch.no_grad(), LiveTensors() as tensors:
            model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False)
    parts = stage_memory(model_size(checkpoint, "cpu"), work, "cpu")["collect"].host
    estimated = sum(parts[name] for name in ("attention", "one layer at work", "decode buffer"))
    assert estimated == pytest.approx(tensors.peak_bytes, rel=0.15)


@pytest.mark.parametrize(("batch", "length"), [(8, 256), (64, 16)])
def test_what_is_kept_for_the_backward_pass_is_what_was_estimated(batch: int, length: int) -> None:
    checkpoint = open_checkpoint("embedded:tiny-gpt-oss")
    moe = checkpoint.description
    model: Any = load(checkpoint, dtype=torch.float32)
    model.attach_shared_expert(moe.expert_width)
    model.requires_grad_(False)
    for parameter in checkpoint.family.hook.nexus_trainable_parameters(model=model).values():
        parameter.requires_grad_(True)
    input_ids = torch.arange(batch * length).view(batch, length) % 2000
    positions = torch.arange(length).expand(batch, -1)
    with LiveTensors() as tensors:
        output = model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
        kept = tensors.live_bytes
    assert output.requires_grad
    work = replace(workload("tiny.yaml", kind="cpu"), train=Passes(batch * length, batch, length))
    # On a GPU the moments are told apart; what is kept is the same.
    memory = stage_memory(model_size(checkpoint, "cpu"), work, "cuda")["train"].moments["vocabulary"]
    assert memory["activations"] + memory["attention"] == pytest.approx(kept, rel=0.15)


def test_plain_families_are_counted_from_what_they_say_otherwise() -> None:
    checkpoint = open_checkpoint("embedded:tiny-gpt-oss")
    stored = {"routed_experts": 1000, "attention": 400, "router": 40, "embeddings": 600}
    config = {"dtype": "bfloat16", "num_hidden_layers": 4, "num_attention_heads": 8}
    dense = plain_costs(config, replace(checkpoint.description, storage="bfloat16"), stored)
    assert (dense.packed_bytes, dense.held_numbers, dense.decoded_numbers) == (0, 1020, 0)
    assert dense.layer_products == 220
    packed = plain_costs(config, checkpoint.description, stored)
    assert (packed.packed_bytes, packed.held_numbers) == (1000, 520)
    assert packed.buffer_numbers == 3 * 128 * 64


def test_sizes_that_are_written_twice_are_the_same() -> None:
    assert costs.BUFFER_BYTES == grouped.DEFAULT_BUFFER_MB << 20
    assert (costs.SLICE_ROWS, costs.PIECE_ROWS) == (sorted_rows.SLICE_ROWS, rows.ROWS_AT_A_TIME)
    assert training.PIECE_NUMBERS == float32_masters.PIECE_NUMBERS
    assert training.BUCKET_NUMBERS == deepspeed_library.BUCKET


def test_zero_divides_what_it_says(shapes: Mapping[str, Checkpoint]) -> None:
    model = model_size(shapes["20b"], "cuda")
    one = workload("gpt_oss_20b_pca.yaml")
    alone = stage_memory(model, one, "cuda")["train"].parts
    learnt = model.shared_numbers(None)
    # In bfloat16 DeepSpeed's stage 1 is its stage 2.
    for number_bytes, stage, cut in ((4, 1, 1), (4, 2, 4), (2, 1, 4), (2, 2, 4)):
        work = replace(one, processes=4, zero_stage=stage, number_bytes=number_bytes)
        parts = stage_memory(model, work, "cuda")["train"].parts
        assert parts["optimizer states"] == learnt * (12 if number_bytes == 2 else 8) // 4
        assert parts["gradients"] == learnt * 4 // cut
        assert parts["packed experts"] == alone["packed experts"]
    third = stage_memory(model, replace(one, processes=4, zero_stage=3), "cuda")["train"].parts
    assert third["packed experts"] == alone["packed experts"] // 4
    assert third["output head"] == 2 * model.head_numbers


def test_remedies_are_tried_on_paper_before_they_are_told(shapes: Mapping[str, Checkpoint]) -> None:
    model, device = model_size(shapes["20b"], "cuda"), find_device("RTX 4090")
    work = workload("gpt_oss_20b_pca.yaml", "train.batch_size=8", "train.gradient_accumulation=2")
    assert estimate_stages(model, work, device)["train"].overflow(device, None) == "device"
    found = remedies(model, work, device, 0, "train", "device")
    assert found
    assert all(remedy.fits and remedy.needs_bytes <= device.available_bytes for remedy in found)
    hopeless = remedies(model, work, replace(device, memory_bytes=2_000_000_000), 0, "train", "device")
    assert [remedy.fits for remedy in hopeless] == [False]
    assert len(hopeless[0].settings) > 2


def test_memory_of_devices_is_what_drivers_report_less_what_no_tensor_gets() -> None:
    reported = {name: find_device(name).memory_bytes / 2**20 for name in ("rtx-4090", "h100", "h200")}
    assert reported == {"rtx-4090": 24_564, "h100": 81_559, "h200": 143_771}
    named, found = find_device("h200"), recognise("NVIDIA H200", 150_109_000_000)
    assert found.available_bytes == 150_109_000_000 - CONTEXT_BYTES
    assert named.available_bytes == pytest.approx(found.available_bytes, rel=0.001)


def test_devices_are_found_by_what_people_and_drivers_call_them() -> None:
    assert find_device("RTX 6000 Ada").name == "rtx-6000-ada"
    assert recognise("NVIDIA H200", 150_000_000_000).name == "h200"
    assert recognise("NVIDIA A100-SXM4-40GB", 42_000_000_000).name == "a100-40g"
    assert recognise("NVIDIA A100 80GB PCIe", 85_000_000_000).name == "a100-80g"
    assert recognise("NVIDIA RTX 6000 Ada Generation", 51_000_000_000).name == "rtx-6000-ada"
    assert recognise("NVIDIA H100 PCIe", 85_000_000_000).name == "h100-pcie"
    assert recognise("NVIDIA L40S", 48_000_000_000).name == "l40s"
    unknown = recognise("Something New", 10**10)
    assert (unknown.name, unknown.memory_bytes) == ("Something New", 10**10)
    with pytest.raises(UsageError, match="did you mean 'h20'"):
        find_device("h20O")


def test_check_tells_memory_disk_work_and_time_for_a_device_that_is_not_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("check", str(RECIPES / "tiny.yaml"), "--device", "h200") == 0
    said = capsys.readouterr().out
    assert "h200 (150.8 GB" in said
    assert "packed experts" in said
    assert call("check", str(RECIPES / "tiny.yaml"), "--device", "h200", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    train = answer["stages"]["train"]
    assert train["memory_bytes"]["optimizer states"] > 0
    assert 0 < train["seconds"] < 60
    assert call("check", str(RECIPES / "tiny.yaml"), "--device", "h2000") == 2


def test_run_refuses_what_cannot_fit_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, store = str(RECIPES / "tiny.yaml"), f"run.store={tmp_path / 'runs'}"
    monkeypatch.setattr(preflight, "host_memory_bytes", lambda: 330_000_000)
    assert call("check", recipe, "--set", store) == 0
    assert "warning: train needs about" in capsys.readouterr().out
    assert call("run", recipe, "--set", store) == 2
    said = capsys.readouterr().err
    assert "collect needs about" in said
    assert "Enough would be: collect.batch_size=" in said
    assert not (tmp_path / "runs").exists()
    settings = ["--set", store, "--set", "collect.tokens=512", "--set", "run.tracking.enabled=false"]
    assert call("run", recipe, *settings, "--until", "collect", "--anyway") == 0


def test_what_a_misfit_is_told_can_be_read(shapes: Mapping[str, Checkpoint]) -> None:
    recipe = load_recipe(RECIPES / "gpt_oss_20b_pca.yaml", ["train.gradient_accumulation=2"])
    ahead = look_ahead(recipe, shapes["20b"], "rtx-4090")
    (misfit,) = [misfit for misfit in ahead.misfits if misfit.stage == "train"]
    sentence = ahead.sentence(misfit)
    assert "train needs about" in sentence
    assert "rtx-4090 has" in sentence
    assert "run.deepspeed.offload=optimizer" in sentence
