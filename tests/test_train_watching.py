"""Training that is watched: held-out text, best state, early stop, steps left out, averages, earlier runs, rules."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import RandomBatches, train_settings, write_converted, write_texts

import nexus_core
from nexus_core.additions import RouterDelta, as_teacher
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.mixture import Batch
from nexus_core.data.packing import PackedSequences
from nexus_core.errors import CheckpointError, TrainingError
from nexus_core.recipe.load import section_from
from nexus_core.recipe.training import Train
from nexus_core.stages.train import train, training_objective
from nexus_core.statistics.listening import listen
from nexus_core.train.anchor import Anchor
from nexus_core.train.evaluation import Best, HeldOut
from nexus_core.train.loop import Trained, fit
from nexus_core.train.memory import peak_memory_gb
from nexus_core.train.passes import output_head

CONSTANT = {"kind": "constant"}


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_converted(tmp_path_factory.mktemp("model"))


def packed(batch: Batch) -> PackedSequences:
    return PackedSequences(batch.input_ids, batch.targets, batch.positions, batch.lengths)


def held_out(retention_weight: float = 1.0) -> HeldOut:
    sets = {"domain": packed(RandomBatches(4).batch(100)), "general": packed(RandomBatches(4).batch(101))}
    return HeldOut(sets, 3, ["domain"], retention_weight)


def run(checkpoint: Checkpoint, folder: Path, settings: Train, **given: Any) -> tuple[nn.Module, Trained]:
    model = nexus_core.load(checkpoint, dtype=torch.float32)
    batches = given.pop("batches", RandomBatches(settings.batch_size))
    objective = training_objective(settings)
    trained = fit(model, checkpoint.family, batches, settings, objective, ["domain"], folder, **given)
    return model, trained


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_held_out_losses_are_those_of_plain_passes(converted) -> None:
    model = nexus_core.load(converted, dtype=torch.float32)
    for parameter in converted.family.hook.nexus_trainable_parameters(model=model).values():
        parameter.data += 0.03
    measured = held_out(retention_weight=2.0)
    values = measured.measure(model, output_head(model), isolates=True)
    with torch.no_grad():
        for name, sequences in measured.sets.items():
            found = {"held_out": sequences, "held_out_base": sequences}
            for kind in found:
                with as_teacher(model) if kind == "held_out_base" else torch.no_grad():
                    logits = model(sequences.input_ids, position_ids=sequences.positions, use_cache=False).logits
                expected = nn.functional.cross_entropy(logits.flatten(0, 1), sequences.targets.flatten())
                assert values[f"{kind}/{name}"] == pytest.approx(float(expected), rel=1e-5)
    risen = max(0.0, values["held_out/general"] - values["held_out_base/general"])
    assert values["held_out_score"] == pytest.approx(values["held_out/domain"] + 2.0 * risen)


def test_the_best_state_becomes_the_model_and_a_run_without_progress_ends_early(converted, tmp_path) -> None:
    changes = {"learning_rate": 0.3, "max_gradient_norm": 100.0, "schedule": CONSTANT, "max_steps": 20}
    settings = train_settings(**changes, evaluate={"every": 1, "sequences": 4, "patience": 3})
    model, trained = run(converted, tmp_path / "best", settings, held_out=held_out())
    scores = [row["held_out_score"] for row in rows(tmp_path / "best")]
    best = min(range(len(scores)), key=scores.__getitem__)
    assert trained.chosen_step == best < trained.steps == best + 3 < 20
    measured = held_out().measure(model, output_head(model), isolates=True)
    assert measured["held_out_score"] == pytest.approx(scores[best], rel=1e-6)
    settings = train_settings(**changes, evaluate={"every": 1, "patience": 3, "keep": "last"})
    last, trained = run(converted, tmp_path / "last", settings, held_out=held_out())
    assert trained.chosen_step == trained.steps
    assert held_out().measure(last, output_head(last), isolates=True)["held_out_score"] > scores[best]


@pytest.mark.parametrize("crash_at", [3, 7])
def test_a_crashed_run_chooses_the_same_state_and_stops_at_the_same_step(converted, tmp_path, crash_at) -> None:
    settings = train_settings(
        learning_rate=0.05, max_steps=12, checkpoint_every=2, schedule=CONSTANT, batch_size=1,
        evaluate={"every": 2, "patience": 3}, anchor={"interval": 3, "alpha": 0.5},
        routing={"strategy": "balance", "gamma": 0.1},
    )  # fmt: skip

    def crash(step: int, values: object) -> None:
        if step == crash_at:
            raise Crash

    whole, expected = run(converted, tmp_path / "whole", settings, held_out=held_out())
    with pytest.raises(Crash):
        run(converted, tmp_path / "broken", settings, held_out=held_out(), report=crash)
    broken, found = run(converted, tmp_path / "broken", settings, held_out=held_out())
    assert (found.steps, found.chosen_step) == (expected.steps, expected.chosen_step)
    assert all(torch.equal(tensor, broken.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_best_counts_evaluations_since_the_best() -> None:
    best = Best()
    assert [best.take(step, score) for step, score in enumerate((3.0, 2.0, 2.5, 2.0, 1.0))] == [1, 1, 0, 0, 1]
    best.take(5, 1.5)
    assert Best.of(best.as_record()) == best == Best(step=4, score=1.0, evaluations_since=1)
    assert Best.of(Best().as_record()) == Best()


class Spoilt(RandomBatches):
    """Batches after which, at some step, the model's loss is not finite, though its weights are."""

    def __init__(self, model_hook: dict[str, bool], steps: range, accumulation: int):
        super().__init__()
        self.state, self.steps, self.accumulation = model_hook, steps, accumulation

    def batch(self, index: int) -> Batch:
        self.state["spoil"] = index // self.accumulation + 1 in self.steps
        return super().batch(index)


def run_spoilt(converted: Checkpoint, folder: Path, steps: range, **changes: Any) -> nn.Module:
    settings = train_settings(gradient_accumulation=1, schedule=CONSTANT, **changes)
    state = {"spoil": False}
    model = nexus_core.load(converted, dtype=torch.float32)

    def spoil(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan if state["spoil"] else output

    handle = model.model.layers[-1].post_attention_layernorm.register_forward_hook(spoil)
    objective, batches = training_objective(settings), Spoilt(state, steps, 1)
    fit(model, converted.family, batches, settings, objective, ["domain"], folder)
    handle.remove()
    return model


def test_a_step_that_is_not_finite_is_left_out_if_wanted(converted, tmp_path, capsys) -> None:
    run_spoilt(converted, tmp_path, range(2, 3), on_nonfinite="skip", max_steps=3)
    found = rows(tmp_path)
    assert [row.get("skipped") for row in found] == [None, None, 1.0, None]
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert "step 2 is left out: the loss is nan" in capsys.readouterr().err
    assert "gradient_norm" in found[3]


def test_too_many_steps_left_out_in_a_row_end_the_run(converted, tmp_path) -> None:
    with pytest.raises(TrainingError, match=r"step 12: the loss is nan, and so it was in the 10 steps before"):
        run_spoilt(converted, tmp_path, range(2, 99), on_nonfinite="skip", max_steps=40)


def test_an_anchor_pulls_the_weights_back_to_an_earlier_state() -> None:
    masters = {"w": torch.tensor([0.0, 4.0])}
    anchor = Anchor(2, 0.25, masters)
    masters["w"] += 4.0
    assert [anchor.is_due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    anchor.average("w", masters["w"])
    assert masters["w"].tolist() == [3.0, 7.0]  # three quarters of the way from 0 and 4 to 4 and 8
    masters["w"] += 4.0
    restored = Anchor(2, 0.25, {"w": torch.zeros(2)})
    restored.load_state_tensors(anchor.state_tensors())
    restored.average("w", masters["w"])
    assert masters["w"].tolist() == [6.0, 10.0]


def test_a_run_begins_with_what_an_earlier_one_had_learnt(converted, tmp_path) -> None:
    sets = write_texts(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    settings = train_settings(routing={"strategy": "trainable"}, schedule=CONSTANT | {"bias_lr_multiplier": 1.0})
    train(converted, sets, settings, ["domain"], first)
    learnt = nexus_core.load(first / "model", dtype=torch.float32)
    # A frozen router keeps the change that it came with.
    settings = train_settings(start_from=str(first), learning_rate=1e-12, max_steps=1)
    train(converted, sets, settings, ["domain"], second)
    model = nexus_core.load(second / "model", dtype=torch.float32)
    for name, tensor in learnt.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-9)
    with pytest.raises(CheckpointError, match=r"start_from: .*nowhere has no nexus_shared_experts"):
        train(converted, sets, train_settings(start_from=str(tmp_path / "nowhere")), ["domain"], second)


@pytest.mark.parametrize(("strategy", "sign"), [("balance", -1), ("sparsify", 1)])
def test_rules_move_the_selection_bias_and_nothing_else_of_the_router(converted, tmp_path, strategy, sign) -> None:
    settings = train_settings(
        routing={"strategy": strategy, "gamma": 0.5},
        schedule=CONSTANT | {"bias_freeze_ratio": 0.5},
        max_steps=2,
        learning_rate=1e-9,
    )
    model = nexus_core.load(converted, dtype=torch.float32)
    counts = {}
    with listen(model, converted.family) as listener, torch.no_grad():
        for index in range(settings.gradient_accumulation):
            batch = RandomBatches(settings.batch_size).batch(index)
            model.base_model(batch.input_ids, position_ids=batch.positions, use_cache=False)
            is_text = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
            for layer, router in listener.routers.items():
                found = torch.bincount(router.indices[is_text.flatten()].flatten(), minlength=8)
                counts[layer] = counts.get(layer, 0) + found
    # The second step lies after the freeze.
    model, _ = run(converted, tmp_path, settings)
    deltas = [module for module in model.modules() if isinstance(module, RouterDelta)]
    for delta, count in zip(deltas, counts.values(), strict=True):
        expected = sign * 0.5 * (count - count.double().mean()).sign().float()
        assert torch.equal(delta.selection_bias, expected)
        assert not delta.weight.any()
        assert not delta.bias.any()


def test_a_selection_bias_changes_who_is_chosen_and_not_how_they_are_weighted(converted) -> None:
    model = nexus_core.load(converted, dtype=torch.float32)
    converted.family.hook.nexus_attach_router_delta(model=model)
    block = converted.family.hook.nexus_moe_blocks(model=model)[0]
    hidden = torch.randn(1, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    delta = next(module for module in model.modules() if isinstance(module, RouterDelta))
    delta.selection_bias[5] = 100.0
    with torch.no_grad(), listen(model, converted.family) as listener:
        block.block(hidden)
        router = listener.routers[block.layer]
        assert (router.indices == 5).any(-1).all()
        plain = nn.functional.linear(hidden[0], block.router.weight, block.router.bias)
        torch.testing.assert_close(router.logits, plain)
        torch.testing.assert_close(router.weights, plain.gather(-1, router.indices).softmax(-1))
        with as_teacher(model):
            block.block(hidden)
        chosen = listener.routers[block.layer].indices
        assert torch.equal(chosen.sort().values, plain.topk(chosen.shape[-1]).indices.sort().values)


def test_each_parts_learning_rate_is_written_down(converted, tmp_path) -> None:
    schedule = CONSTANT | {"bias_lr_multiplier": 0.1, "bias_freeze_ratio": 0.5, "after_freeze": "weights"}
    settings = train_settings(routing={"strategy": "trainable"}, schedule=schedule, max_steps=2)
    run(converted, tmp_path, settings)
    names = ("learning_rate", "learning_rate/router_weights", "learning_rate/router_biases")
    found = [[row[name] for name in names] for row in rows(tmp_path)[1:]]
    assert found[0] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert found[1] == pytest.approx([1e-3, 1e-3, 0.0])
    assert rows(tmp_path)[1]["peak_memory_gb"] > 0


def test_losses_take_parameters_beside_their_weight() -> None:
    settings = section_from(Train, {}, ["losses.logits_kl={weight: 2.0, direction: reverse}"])
    assert settings.loss_weights == {"lm": 1.0, "router_kl": 1.0, "logits_kl": 2.0}
    assert settings.loss_parameters["logits_kl"] == {"direction": "reverse", "temperature": 1.0}
    (kl,) = [loss for loss in training_objective(settings).losses if loss.name == "logits_kl"]
    assert kl.parameters.direction == "reverse"
    # A plain weight is the same as a section of it.
    plain, section = (section_from(Train, {}, [f"losses.lm={value}"]) for value in ("2.0", "{weight: 2.0}"))
    assert plain == section


def test_peak_memory_is_the_processs_own_and_not_that_of_who_started_it() -> None:
    held = torch.ones(200_000_000, dtype=torch.uint8)
    ours = peak_memory_gb(held.device)
    code = (
        "import torch; from nexus_core.train.memory import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')));"
        "held = torch.ones(100_000_000, dtype=torch.uint8); print(peak_memory_gb(held.device))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before < ours - 0.2
    assert 0.09 < after - before < 0.2
