"""Hearing a model's routers: every forward pass, with its graph, and nothing else."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from live_tensors import LiveTensors

from nexus_core.additions import as_teacher
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import StageError
from nexus_core.models import load
from nexus_core.stages.router_pass import RoutedBatch, RouterPass
from nexus_core.statistics.kept_inputs import KeptInputs
from nexus_core.statistics.listening import HeardLayer, Listener, listen
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.probabilities import ProbabilityWriter
from nexus_core.types import RouterOutput


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def model(checkpoint):
    return load(checkpoint, dtype=torch.float32)


IDS = torch.arange(24).reshape(2, 12)


def test_routers_inputs_and_outputs_are_the_modules_own(checkpoint, model):
    with torch.no_grad(), listen(model, checkpoint.family, keep_inputs=True) as listener:
        model(input_ids=IDS, use_cache=False)
    for block in checkpoint.family.hook.nexus_moe_blocks(model=model):
        inputs = listener.inputs[block.layer]
        assert inputs.shape == (24, model.config.hidden_size)
        with torch.no_grad():
            again = checkpoint.family.hook.nexus_router_logits(output=block.router(inputs))
            outputs = block.block(inputs.view(2, 12, -1))
        torch.testing.assert_close(listener.routers[block.layer].logits, again.logits)
        assert torch.equal(listener.routers[block.layer].indices, again.indices)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        torch.testing.assert_close(listener.outputs[block.layer], outputs.flatten(0, 1))


def test_the_last_of_several_passes_is_kept_and_nothing_after_the_context(checkpoint, model):
    with torch.no_grad(), listen(model, checkpoint.family) as listener:
        model(input_ids=IDS, use_cache=False)
        first = listener.routers[0]
        model(input_ids=IDS + 50, use_cache=False)
        second = listener.routers[0]
    assert not torch.equal(first.logits, second.logits)
    assert not listener.inputs
    with torch.no_grad():
        model(input_ids=IDS + 20, use_cache=False)
    assert listener.routers[0] is second
    assert all(not module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_exception(checkpoint, model):
    with pytest.raises(RuntimeError, match="stop"), listen(model, checkpoint.family):
        raise RuntimeError("stop")
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("backward_inside", [True, False])
def test_layers_that_checkpointing_runs_again_are_not_heard_and_gradients_reach_through(
    checkpoint, model, backward_inside
):
    def router_gradient(*, checkpointing: bool) -> torch.Tensor:
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with listen(model, checkpoint.family) as listener:
            model(inputs_embeds=embeddings, use_cache=False)
            heard = dict(listener.routers)
            loss = sum(output.logits.square().mean() for output in heard.values())
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert {layer: id(output) for layer, output in listener.routers.items()} == {
            layer: id(output) for layer, output in heard.items()
        }
        return embeddings.grad

    plain, checkpointed = (router_gradient(checkpointing=flag) for flag in (False, True))
    assert plain.abs().max() > 0
    torch.testing.assert_close(checkpointed, plain)


def test_teacher_and_student_are_told_apart_by_when_they_run(checkpoint, model):
    checkpoint.family.hook.nexus_attach_shared_expert(model=model, width=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared_expert.down_proj" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), listen(model, checkpoint.family) as listener:
        with as_teacher(model):
            model(input_ids=IDS, use_cache=False)
        teacher = dict(listener.routers)
        model(input_ids=IDS, use_cache=False)
    assert torch.equal(teacher[0].logits, listener.routers[0].logits)
    assert not torch.equal(teacher[1].logits, listener.routers[1].logits)


def test_routers_that_are_never_called_are_reported(checkpoint, model):
    with (
        listen(model, checkpoint.family) as listener,
        pytest.raises(StageError, match=r"layers \[0, 1\] were not heard"),
    ):
        listener.refuse_if_incomplete()


def test_layers_are_handed_on_as_they_come_and_not_held(checkpoint, model):
    taken, held = {}, []
    with torch.no_grad(), listen(model, checkpoint.family, keep_inputs=True) as listener:
        model(input_ids=IDS, use_cache=False)
        kept = {layer: (listener.routers[layer], listener.inputs[layer]) for layer in listener.layers}
        listener.clear()

        def take(layer, heard):
            held.append((listener.routers.copy(), listener.inputs.copy(), listener.outputs.copy()))
            taken[layer] = heard

        listener.hand_on(take)
        for _ in range(2):
            taken.clear()
            model(input_ids=IDS, use_cache=False)
            listener.refuse_if_incomplete()
            listener.clear()
    assert list(taken) == list(listener.layers)
    assert held == 4 * [({}, {}, {})]
    for layer, (router, inputs) in kept.items():
        assert torch.equal(taken[layer].router.logits, router.logits)
        assert torch.equal(taken[layer].inputs, inputs)
        assert taken[layer].outputs.shape == inputs.shape


def test_a_layer_is_handed_on_when_both_its_router_and_its_block_were_heard():
    router = RouterOutput(torch.zeros(3, 2), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    inputs, outputs = torch.zeros(3, 4), torch.ones(3, 4)
    listener, taken = Listener((0, 1, 2), keeps_inputs=True), []
    listener.hand_on(lambda layer, heard: taken.append((layer, heard)))
    # Blocks side by side, the last one first, and one whose router is called after it.
    listener.hear_router(2, router)
    listener.hear_router(0, router)
    listener.hear_block(1, inputs, outputs)
    assert not taken
    listener.hear_block(2, inputs, outputs)
    listener.hear_router(1, router)
    with pytest.raises(StageError, match=r"layers \[0\] were not heard"):
        listener.refuse_if_incomplete()
    listener.hear_block(0, inputs, outputs)
    listener.refuse_if_incomplete()
    assert [layer for layer, _ in taken] == [2, 1, 0]
    assert all(heard == HeardLayer(router, inputs, outputs) for _, heard in taken)


def test_a_layer_that_runs_twice_in_a_pass_is_not_counted_twice(checkpoint, model):
    with torch.no_grad(), listen(model, checkpoint.family) as listener:
        listener.hand_on(lambda layer, heard: None)
        model(input_ids=IDS, use_cache=False)
        with pytest.raises(StageError, match="layer 0 ran twice in one forward pass"):
            model(input_ids=IDS, use_cache=False)
        listener.clear()
        model(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("probabilities", [False, True])
def test_collecting_holds_one_layers_inputs_at_a_time(tmp_path, probabilities):
    layers, tokens, wide = 8, 512, 512
    folder = write_tiny_checkpoint(tmp_path / "deep", layers=layers, hidden=wide, experts=8)
    checkpoint = open_checkpoint(folder)
    model, moe = load(checkpoint, dtype=torch.float32), checkpoint.description
    batch = RoutedBatch(
        torch.arange(tokens).view(8, -1) % 60,
        torch.arange(tokens // 8).expand(8, -1),
        torch.zeros(tokens, dtype=torch.int64),
    )
    passes = []
    with listen(model, checkpoint.family, keep_inputs=True) as listener, ExitStack() as stack:
        statistics = RouterStatistics.zeros(moe.layers, moe.experts)
        writer = None
        if probabilities:
            writer = stack.enter_context(ProbabilityWriter(tmp_path / "p.npz", 2 * tokens, moe.layers, moe.experts))
        collecting = RouterPass(model, listener, statistics, KeptInputs(moe.layers, 4 * tokens, 16), writer=writer)
        collecting.route(batch)  # what is made once
        with LiveTensors() as live:
            collecting.route(batch)
        passes.append(live.peak_bytes)
    with LiveTensors() as live, torch.inference_mode():
        model.base_model(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)
    passes.append(live.peak_bytes)
    one_layer = 2 * tokens * wide * 4
    assert passes[0] < passes[1] + 1.5 * one_layer
