"""The training loop on a tiny random model: what changes, what must not, and what is written down."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import RandomBatches, train_settings, write_converted, write_texts
from transformers import AutoModelForCausalLM

import nexus_core
import nexus_core.auto
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.distill.signals import SIGNALS
from nexus_core.errors import CheckpointError, TrainingError
from nexus_core.recipe.schema import Recipe
from nexus_core.recipe.training import Train
from nexus_core.stages.train import STAGE, train, training_objective
from nexus_core.statistics.listening import listen
from nexus_core.train.loop import fit
from nexus_core.train.passes import MicroBatch, OnlineTeacher, count_tokens, output_head, read_signals
from nexus_core.train.setup import recompute_activations

IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_converted(tmp_path_factory.mktemp("model"))


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and buffer."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def run(checkpoint: Checkpoint, settings: Train, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nexus_core.load(checkpoint, dtype=dtype)
    objective = training_objective(settings)
    batches = RandomBatches(settings.batch_size, settings.sequence_length, settings.seed)
    fit(model, checkpoint.family, batches, settings, objective, ["domain"], folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["frozen", "trainable", "bias"])
def test_only_what_the_routing_strategy_names_changes(converted, tmp_path, routing, dtype) -> None:
    before = digests(nexus_core.load(converted, dtype=dtype))
    settings = train_settings(
        routing={"strategy": routing}, max_steps=2, schedule={"kind": "constant", "bias_lr_multiplier": 1.0}
    )
    model = run(converted, settings, tmp_path, dtype)
    after = digests(model)
    changed = {name for name, digest in before.items() if after[name] != digest}
    shared = {name for name in before if ".shared_expert." in name}
    # With a zero start, only the down-projection has a gradient in the first step; the rest follows in the second.
    assert changed == shared
    deltas = {name for name in after if ".router_delta." in name and not name.endswith("selection_bias")}
    moved = {name for name in deltas if model.get_parameter(name).abs().max() > 0}
    assert moved == {name for name in deltas if routing == "trainable" or name.endswith("bias")}
    assert bool(deltas) is (routing != "frozen")


def test_the_teacher_is_the_base_before_and_after(converted, tmp_path) -> None:
    base = nexus_core.load(converted.folder.parent / "base", dtype=torch.float32)
    model = run(converted, train_settings(routing={"strategy": "trainable"}), tmp_path)
    with torch.no_grad():
        expected = base(IDS).logits
        with nexus_core.as_teacher(model):
            assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(model(IDS).logits, expected)


def test_step_0_is_the_bases_perplexity_on_the_first_steps_learnt_text(converted, tmp_path) -> None:
    settings = train_settings(max_steps=1)
    run(converted, settings, tmp_path)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    base = nexus_core.load(converted.folder.parent / "base", dtype=torch.float32)
    losses = []
    for index in range(settings.gradient_accumulation):
        batch = RandomBatches(settings.batch_size, settings.sequence_length, settings.seed).batch(index)
        for ids, targets, name in zip(batch.input_ids, batch.targets, batch.set_names, strict=True):
            if name == "domain":
                with torch.no_grad():
                    logits = base(ids[None]).logits[0]
                losses.append(nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none"))
    counted = torch.cat([loss[loss != 0] for loss in losses])
    assert first["step"] == 0
    assert first["perplexity"] == pytest.approx(math.exp(counted.mean()), rel=1e-4)


def test_the_router_stands_still_after_the_schedule_fixes_it(converted, tmp_path) -> None:
    schedule = {"kind": "constant", "bias_freeze_ratio": 0.5, "bias_lr_multiplier": 1.0, "temperature": [2.0, 2.0]}
    settings = train_settings(routing={"strategy": "trainable"}, schedule=schedule, max_steps=4, weight_decay=0.1)
    half = train_settings(
        routing={"strategy": "trainable"},
        schedule=schedule | {"bias_freeze_ratio": 1.0},
        max_steps=2,
        weight_decay=0.1,
    )
    whole_run = run(converted, settings, tmp_path / "whole")
    half_run = run(converted, half, tmp_path / "half")
    for name, parameter in half_run.named_parameters():
        if ".router_delta." in name:
            assert torch.equal(whole_run.get_parameter(name), parameter)


def test_a_model_that_cannot_compute_activations_again_is_refused(converted) -> None:
    model = nexus_core.load(converted, dtype=torch.float32)
    model.supports_gradient_checkpointing = False
    with pytest.raises(TrainingError, match="NexusGptOssForCausalLM cannot compute activations again"):
        recompute_activations(model)


@pytest.mark.parametrize("recomputes", [False, True])
def test_accumulated_gradients_are_those_of_one_big_batch(converted, recomputes) -> None:
    def gradients(batch_size: int, accumulation: int, recompute: bool) -> dict[str, torch.Tensor]:
        model = nexus_core.load(converted, dtype=torch.float32).double()
        if recompute:
            recompute_activations(model)
        trainables = converted.family.hook.nexus_trainable_parameters(model=model)
        generator = torch.Generator().manual_seed(0)
        model.requires_grad_(False)
        for parameter in trainables.values():
            parameter.requires_grad_(True)
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        batches = RandomBatches(batch_size)
        micro_batches = [MicroBatch.of(batches.batch(i), {"domain"}, "cpu") for i in range(accumulation)]
        step_tokens = count_tokens(micro_batches)
        head = output_head(model)
        with listen(model, converted.family) as listener:
            for micro_batch in micro_batches:
                teacher = OnlineTeacher(model, listener, head)
                signals = read_signals(model, head, listener, teacher, micro_batch, SIGNALS, step_tokens, 2.0)
                losses = training_objective(train_settings()).losses
                sum(loss.weight * loss(signals) for loss in losses).backward()
        return {name: parameter.grad for name, parameter in trainables.items()}

    one, cut = gradients(6, 1, False), gradients(1, 6, recomputes)
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-3
    for name, gradient in one.items():
        # Losses over routers are float32; the rest of the graph is not.
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


def test_signals_are_the_rows_of_plain_forward_passes(converted) -> None:
    model = nexus_core.load(converted, dtype=torch.float32)
    for parameter in converted.family.hook.nexus_trainable_parameters(model=model).values():
        parameter.data += 0.05
    batch = RandomBatches(batch_size=3).batch(0)
    micro_batch = MicroBatch.of(batch, {"domain"}, "cpu")
    with torch.no_grad(), listen(model, converted.family) as listener:
        head = output_head(model)
        teacher_pass = OnlineTeacher(model, listener, head)
        counts = count_tokens([micro_batch])
        signals = read_signals(model, head, listener, teacher_pass, micro_batch, SIGNALS, counts, 1.0)
        student = model(batch.input_ids).logits
        with nexus_core.as_teacher(model):
            teacher = model(batch.input_ids).logits
    is_kept = torch.tensor([name != "domain" for name in batch.set_names])
    counts = batch.targets != -100
    found = [head.logits(hidden) for hidden in (signals.learnt_hidden, signals.kept_hidden, signals.teacher_hidden)]
    torch.testing.assert_close(found[0], student[counts & ~is_kept[:, None]])
    torch.testing.assert_close(found[1], student[counts & is_kept[:, None]])
    torch.testing.assert_close(found[2], teacher[counts & is_kept[:, None]])
    assert torch.equal(signals.learnt_targets, batch.targets[counts & ~is_kept[:, None]])
    assert [len(layer) for layer in signals.router_logits] == [int(batch.lengths.sum())] * 2


def test_no_teacher_pass_where_no_loss_looks_at_it(converted, tmp_path) -> None:
    settings = train_settings(losses={"lm": 1.0, "logits_kl": 0.0}, max_steps=2)
    model = nexus_core.load(converted, dtype=torch.float32)
    passes = []
    model.base_model.layers[0].register_forward_hook(lambda _, given, __: passes.append(len(given[0])))
    fit(model, converted.family, RandomBatches(), settings, training_objective(settings), ["domain"], tmp_path)
    of_batches = [rows for rows in passes if rows == settings.batch_size]  # the others try the model out
    assert len(of_batches) == 3 * settings.gradient_accumulation  # step 0 and two steps
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "router_entropy" in row
    assert not {"router_l1", "router_kl", "logits_kl"} & set(row)


def test_every_step_is_written_down_and_reported(converted, tmp_path) -> None:
    settings = train_settings(max_steps=4, losses={"lm": 1.0, "router_kl": 0.5, "logits_kl": 4.0})
    reported = {}
    model = nexus_core.load(converted, dtype=torch.float32)
    fit(
        model,
        converted.family,
        RandomBatches(),
        settings,
        training_objective(settings),
        ["domain"],
        tmp_path,
        report=reported.__setitem__,
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [0, 1, 2, 3, 4]
    assert rows == list(reported.values())
    # A zero start is the base.
    assert rows[0]["router_kl"] == rows[0]["logits_kl"] == rows[0]["router_l1"] == 0
    assert rows[0]["lm"] == rows[0]["loss"] == rows[1]["lm"]
    for row in rows[1:]:
        assert math.isclose(row["loss"], row["lm"] + 0.5 * row["router_kl"] + 4 * row["logits_kl"], rel_tol=1e-5)
        assert {"learning_rate", "temperature", "gradient_norm", "router_entropy", "router_entropy_base"} <= set(row)
        assert row["tokens_per_second"] > 0
    assert rows[-1]["router_l1"] > 0


def test_a_warning_with_advice_is_said_once(converted, tmp_path, capsys) -> None:
    run(converted, train_settings(learning_rate=1.0, max_steps=4, max_gradient_norm=100.0), tmp_path)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line and "router KL" in line]
    assert len(warnings) == 1
    assert "lower train.learning_rate" in warnings[0]


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(converted, tmp_path) -> None:
    settings = train_settings(max_steps=6, checkpoint_every=2)
    model = nexus_core.load(converted, dtype=torch.float32)
    trainables = converted.family.hook.nexus_trainable_parameters(model=model)

    def spoil(step: int, values: object) -> None:
        if step == 3:
            next(iter(trainables.values())).data.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*step-000002.*train\.learning_rate"):
        fit(
            model,
            converted.family,
            RandomBatches(),
            settings,
            training_objective(settings),
            ["domain"],
            tmp_path,
            report=spoil,
        )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_only_the_newest_checkpoints_are_kept_and_hold_no_frozen_weights(converted, tmp_path) -> None:
    run(converted, train_settings(max_steps=5, checkpoint_every=1, keep_checkpoints=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    trainable_bytes = sum(
        tensor.numel() * 4
        for name, tensor in nexus_core.load(converted).named_parameters()
        if ".shared_expert." in name
    )
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints" / "step-000005").iterdir())
    assert trainable_bytes * 3 < size < trainable_bytes * 3 + 10_000  # weights and two moments


@pytest.mark.parametrize("routing", ["frozen", "trainable"])
def test_the_model_at_the_end_is_the_trained_one_with_the_bases_shards_linked(converted, tmp_path, routing) -> None:
    sets = write_texts(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    metrics = train(converted, sets, train_settings(routing={"strategy": routing}), ["domain"], out)
    assert metrics["steps"] == 4
    assert metrics["lm"] > 0
    assert (out / "curves.png").stat().st_size > 10_000

    model = nexus_core.load(out / "model", dtype=torch.float32)
    trained = load_file(out / "checkpoints" / "step-000004" / "trainables.safetensors")
    assert trained
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor)

    auto = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(auto(IDS).logits, model(IDS).logits)
    assert auto.config.has_router_delta is (routing == "trainable")

    for shard in converted.folder.glob("model-*.safetensors"):
        assert (out / "model" / shard.name).stat().st_ino == shard.stat().st_ino
    names = {path.name for path in (out / "model").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= names
    assert not names & {"stage.json", "convert_report.json"}


def test_a_checkpoint_of_one_shard_keeps_everything_that_lay_beside_the_shared_experts(converted, tmp_path) -> None:
    single = tmp_path / "single"
    nexus_core.load(converted).save_pretrained(single)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (single / name).write_bytes((converted.folder / name).read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    train(open_checkpoint(single), write_texts(tmp_path), train_settings(max_steps=2), ["domain"], out)
    with torch.no_grad(), nexus_core.as_teacher(nexus_core.load(out / "model", dtype=torch.float32)) as teacher:
        base = nexus_core.load(converted.folder.parent / "base", dtype=torch.float32)
        assert torch.equal(teacher(IDS).logits, base(IDS).logits)


def test_the_key_depends_on_what_the_numbers_depend_on_and_on_nothing_else() -> None:
    recipe = {
        "schema": 1,
        "model": {"path": "somewhere"},
        "data": {"domain": [{"path": "a.txt"}], "general": [{"path": "b.txt"}], "other": [{"path": "c.txt"}]},
        "train": {"data": {"domain": 1.0, "general": 1.0}},
    }

    def settings(**changes: object) -> object:
        return STAGE.settings(Recipe.model_validate(recipe | {"train": recipe["train"] | changes}))

    assert settings(learn=["domain"], checkpoint_every=7, keep_checkpoints=9) == settings()
    assert settings(learn=["general"]) != settings()
    assert settings(learning_rate=0.5) != settings()
    assert set(settings()["sources"]) == {"domain", "general"}


def test_an_untouched_base_is_refused(converted, tmp_path) -> None:
    base = open_checkpoint(converted.folder.parent / "base")
    with pytest.raises(CheckpointError, match=r"without shared experts.*nexus convert"):
        train(base, write_texts(tmp_path), train_settings(), ["domain"], tmp_path)
