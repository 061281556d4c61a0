"""Neuron saliency and expert norms: against a loop over tokens, of a running model, and through their file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from family_checkpoints import write_family_checkpoint, write_fp8_checkpoint
from gpt_oss_checkpoints import write_tiny_checkpoint
from layer_experts import EXPERTS, HIDDEN, WIDTH, activation, random_expert

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import ShapeError, UsageError
from nexus_core.models import load
from nexus_core.statistics.activity import ExpertActivity
from nexus_core.statistics.listening import HeardLayer, listen
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.saliency import FILE_NAME, NeuronSaliency, SaliencyFile
from nexus_core.types import RouterOutput

SETS = ("domain", "general")
LAYERS = (0, 2)
WRITERS = {
    "packed": write_tiny_checkpoint,
    "fused": partial(write_family_checkpoint, model_type="qwen3_moe"),
    "fp8": write_fp8_checkpoint,
}


def routed(tokens: int, seed: int = 0) -> tuple[torch.Tensor, RouterOutput, torch.Tensor]:
    """Inputs, what a router made of them, and which set each token is of; some count for none."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    chosen, indices = logits.topk(2, dim=1)
    sets_T = torch.randint(-1, 2, (tokens,), generator=generator)
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        RouterOutput(logits, chosen.softmax(dim=1), indices),
        sets_T,
    )


def gathered(tokens: int, seed: int = 0) -> tuple[NeuronSaliency, torch.Tensor]:
    saliency = NeuronSaliency.zeros(LAYERS, SETS, EXPERTS, WIDTH)
    hidden_TD, router, sets_T = routed(tokens, seed)
    saliency.count(sets_T)
    norms_E = saliency.update(1, hidden_TD, router, sets_T, random_expert, activation)
    return saliency, norms_E


def test_sums_are_those_of_a_loop_over_tokens() -> None:
    saliency, norms_E = gathered(40)

    hidden_TD, router, sets_T = routed(40)
    activity, norms = torch.zeros(2, EXPERTS, WIDTH), torch.zeros(EXPERTS)
    for x, weights, indices, number in zip(hidden_TD, router.weights, router.indices, sets_T.tolist(), strict=True):
        for gate_weight, expert in zip(weights, indices.tolist(), strict=True):
            if number < 0:
                continue
            own = random_expert(expert)
            neurons = activation(own.gate @ x + own.gate_bias, own.up @ x + own.up_bias)
            activity[number, expert] += gate_weight * neurons.abs()
            norms[expert] += gate_weight * (own.down @ neurons + own.down_bias).norm()
    torch.testing.assert_close(saliency.activity[:, 1].float(), activity, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms_E.float(), norms, rtol=1e-5, atol=1e-6)
    assert not saliency.activity[:, 0].any()
    assert saliency.tokens.tolist() == [int((sets_T == 0).sum()), int((sets_T == 1).sum())]
    for expert in router.indices[sets_T >= 0].unique().tolist():
        expected = random_expert(expert).down.double().norm(dim=0)
        torch.testing.assert_close(saliency.output_norm[1, expert], expected)


def test_shards_merge_to_what_one_pass_gives() -> None:
    hidden_TD, router, sets_T = routed(40)
    whole, _ = gathered(40)
    parts = []
    for part in (slice(0, 15), slice(15, 40)):
        shard = NeuronSaliency.zeros(LAYERS, SETS, EXPERTS, WIDTH)
        shard.count(sets_T[part])
        cut = RouterOutput(router.logits[part], router.weights[part], router.indices[part])
        shard.update(1, hidden_TD[part], cut, sets_T[part], random_expert, activation)
        parts.append(shard)

    merged = parts[0].merge(parts[1])

    assert torch.equal(merged.tokens, whole.tokens)
    # A product of fewer rows is a product in another order: float32 activations differ in their last bit.
    torch.testing.assert_close(merged.activity, whole.activity, rtol=1e-5, atol=1e-7)
    assert torch.equal(merged.output_norm, whole.output_norm)
    with pytest.raises(ShapeError, match="cannot be merged"):
        whole.merge(NeuronSaliency.zeros(LAYERS, ("domain",), EXPERTS, WIDTH))


def test_the_file_gives_back_every_bit_and_a_layers_saliency_per_token(tmp_path: Path) -> None:
    saliency, _ = gathered(40)
    saliency.save(tmp_path / FILE_NAME, {"model": "mine"})

    opened = SaliencyFile(tmp_path / FILE_NAME)

    again = opened.load()
    assert (again.layers, again.sets) == (LAYERS, SETS)
    assert opened.metadata == {"model": "mine"}
    assert opened.shape == (EXPERTS, WIDTH)
    for name in ("tokens", "activity", "output_norm"):
        assert torch.equal(getattr(again, name), getattr(saliency, name))
    layer = opened.layer(2, ("domain",), ("general",))
    for number, found_EF in enumerate((layer.learnt_EF, layer.kept_EF)):
        expected = saliency.activity[number, 1] * saliency.output_norm[1] / saliency.tokens[number]
        np.testing.assert_allclose(found_EF, expected.numpy())
    np.testing.assert_allclose(layer.contrasted(0.5), layer.learnt_EF - 0.5 * layer.kept_EF)
    assert opened.layer(2, SETS, ()).kept_EF is None


def test_a_file_that_is_something_else_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"nonsense", b""):
        (tmp_path / FILE_NAME).write_bytes(content)
        with pytest.raises(UsageError, match=f"{FILE_NAME}: is not a whole file .* run `nexus collect` again"):
            SaliencyFile(tmp_path / FILE_NAME)
    RouterStatistics.zeros((0,), 4).save(tmp_path / "stats", {})
    with pytest.raises(UsageError, match="stats: holds no neuron saliency"):
        SaliencyFile(tmp_path / "stats")


@pytest.mark.parametrize("family", WRITERS)
def test_of_a_running_model_it_adds_up_to_what_the_layers_put_out(family: str, tmp_path: Path) -> None:
    """Neurons that the family's experts really have: from them the routed output can be put together again."""
    checkpoint = open_checkpoint(WRITERS[family](tmp_path / "model"))
    moe, hook = checkpoint.description, checkpoint.family.hook
    model = load(checkpoint, dtype=torch.float32)
    saliency = NeuronSaliency.zeros(moe.layers, ("domain",), moe.experts, moe.expert_width)
    statistics = RouterStatistics.zeros(moe.layers, moe.experts, expert_norms=True)
    activity = ExpertActivity(saliency, checkpoint.family, checkpoint.config, model)
    ids = torch.randint(0, moe.vocabulary_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with listen(model, checkpoint.family, keep_inputs=True) as listener, torch.inference_mode():
        model(input_ids=ids)
    sets_T = torch.zeros(ids.numel(), dtype=torch.int64)
    saliency.count(sets_T)
    for layer in moe.layers:
        heard = HeardLayer(listener.routers[layer], listener.inputs[layer], listener.outputs[layer])
        activity.record(statistics, layer, heard, sets_T)

    for position, block in enumerate(hook.nexus_moe_blocks(model=model)):
        router, hidden_TD = listener.routers[block.layer], listener.inputs[block.layer]
        output_TD, norms_E = torch.zeros_like(hidden_TD), torch.zeros(moe.experts)
        expected_EF = torch.zeros(moe.experts, moe.expert_width)
        for expert in range(moe.experts):
            own = hook.nexus_read_expert(
                reader=checkpoint.reader,
                config=checkpoint.config,
                layer=block.layer,
                expert=expert,
                dtype=torch.float32,
            )
            gate, up = (
                torch.nn.functional.linear(hidden_TD, weight, bias)
                for weight, bias in ((own.gate, own.gate_bias), (own.up, own.up_bias))
            )
            neurons = hook.nexus_neuron_activations(config=checkpoint.config, gate=gate, up=up)
            each_TD = torch.nn.functional.linear(neurons, own.down, own.down_bias)
            gate_weight_T = (router.weights * (router.indices == expert)).sum(dim=1).float()
            output_TD += gate_weight_T[:, None] * each_TD
            norms_E[expert] = gate_weight_T @ each_TD.norm(dim=1)
            expected_EF[expert] = gate_weight_T @ neurons.abs() * own.down.norm(dim=0)
        if family != "fp8":  # whose block adds a shared expert of the base's own
            torch.testing.assert_close(output_TD, listener.outputs[block.layer], rtol=1e-4, atol=1e-4)
        found_EF = (saliency.activity[0, position] * saliency.output_norm[position]).float()
        torch.testing.assert_close(found_EF, expected_EF, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.output_norm_sum[position].float(), norms_E, rtol=1e-4, atol=1e-4)


def test_expert_norms_go_through_merging_and_the_file(tmp_path: Path) -> None:
    statistics = RouterStatistics.zeros((0, 1), 4, expert_norms=True)
    statistics.output_norm_sum += torch.arange(8, dtype=torch.float64).view(2, 4)

    merged = statistics.merge(statistics).to("cpu")
    merged.save(tmp_path / "stats", {})

    loaded, _ = RouterStatistics.load(tmp_path / "stats")
    assert torch.equal(loaded.output_norm_sum, 2 * statistics.output_norm_sum)
    plain = RouterStatistics.zeros((0, 1), 4)
    plain.save(tmp_path / "plain", {})
    assert RouterStatistics.load(tmp_path / "plain")[0].output_norm_sum is None
    with pytest.raises(ShapeError, match="with and without expert norms"):
        plain.merge(statistics)
