"""`collect` on a real checkpoint and real files: what it writes is what the routers did."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from collected_text import write_sets
from gpt_oss_checkpoints import write_tiny_checkpoint
from safetensors.torch import load_file

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.cli import nexus
from nexus_core.data.samples import draw
from nexus_core.errors import DataError, NexusError, StageError
from nexus_core.models import choose_device, compute_dtype, load
from nexus_core.recipe.schema import Collect, Source
from nexus_core.stages.collect import STAGE, collect
from nexus_core.statistics.moments import RouterStatistics

SETTINGS = Collect(tokens=600, sequence_length=32, batch_size=4, keep_inputs=50, keep_probabilities=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocabulary=512, tokenizer=True))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def collected(checkpoint, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("collected")
    settings = SETTINGS.model_copy(update={"data": {"domain": 0.75, "general": 0.25}})
    metrics = collect(checkpoint, sets, settings, out, dtype=torch.float32)
    return out, metrics, settings


@pytest.fixture(scope="module")
def heard(checkpoint, sets, collected):
    """Router logits, MoE inputs and outputs per layer of every real token, one document at a time, by plain hooks."""
    _, _, settings = collected
    model = load(checkpoint, dtype=torch.float32)
    samples = draw(checkpoint, sets, settings.data, settings, "train")
    found = {name: [[] for _ in checkpoint.description.layers] for name in ("logits", "inputs", "outputs")}
    blocks = checkpoint.family.hook.nexus_moe_blocks(model=model)

    def hear(position: int, name: str, choose):
        def hook(module, arguments, output):
            first = output[0] if isinstance(output, tuple) else output
            found[name][position].append((arguments[0] if choose == "input" else first).flatten(0, -2))

        return hook

    for position, block in enumerate(blocks):
        block.router.register_forward_hook(hear(position, "logits", "output"))
        block.block.register_forward_hook(hear(position, "inputs", "input"))
        block.block.register_forward_hook(hear(position, "outputs", "output"))
    for sample in samples:
        rows = zip(sample.sequences.input_ids, sample.sequences.positions, sample.sequences.lengths, strict=True)
        for row, positions, length in rows:
            # without its padding and its neighbours, which must not have mattered
            begins = (positions[:length] == 0).nonzero().flatten().tolist()
            for start, end in pairwise([*begins, int(length)]):
                with torch.no_grad():
                    model(input_ids=row[None, start:end], use_cache=False)
    return {name: [torch.cat(parts) for parts in layers] for name, layers in found.items()}


def test_statistics_are_those_of_every_real_token(checkpoint, collected, heard):
    out, metrics, _ = collected
    statistics, metadata = RouterStatistics.load(out)
    assert statistics.tokens == metrics["tokens"] == 600
    assert metadata["tokens_per_set"] == {"domain": 450, "general": 150}
    assert metadata["layers"] == list(statistics.layers) == list(checkpoint.description.layers)
    for position, logits_TE in enumerate(heard["logits"]):
        assert logits_TE.shape == (600, checkpoint.description.experts)
        probabilities = logits_TE.double().softmax(dim=1).numpy()
        np.testing.assert_allclose(statistics.covariance()[position], np.cov(probabilities.T), rtol=0, atol=1e-7)
        np.testing.assert_allclose(statistics.mean()[position], probabilities.mean(axis=0), rtol=0, atol=1e-6)
        chosen = logits_TE.topk(checkpoint.description.experts_per_token).indices
        count = torch.bincount(chosen.flatten(), minlength=checkpoint.description.experts)
        assert torch.equal(statistics.topk_count[position], count)


def test_probabilities_are_those_the_statistics_come_from(collected, heard):
    out, _, _ = collected
    statistics, _ = RouterStatistics.load(out)
    with np.load(out / "router_probabilities.npz") as stored:
        probabilities, layers = stored["probabilities"], stored["layers"]
    assert probabilities.dtype == np.float16
    assert probabilities.shape == (600, len(statistics.layers), statistics.experts)
    assert tuple(layers) == statistics.layers
    for position, logits_TE in enumerate(heard["logits"]):
        np.testing.assert_allclose(probabilities[:, position], logits_TE.softmax(dim=1), rtol=2e-3, atol=1e-4)
        covariance = np.cov(probabilities[:, position].astype(np.float64).T)
        np.testing.assert_allclose(statistics.covariance()[position], covariance, rtol=0, atol=1e-4)


def test_kept_inputs_are_evenly_spread_and_come_with_their_outputs(collected, heard):
    out, _, _ = collected
    kept = load_file(out / "moe_inputs.safetensors")
    places = [(2 * number + 1) * 600 // 100 for number in range(50)]
    for position, layer in enumerate(RouterStatistics.load(out)[0].layers):
        found, expected = kept[f"layers.{layer}.inputs"], heard["inputs"][position][places]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found, expected = kept[f"layers.{layer}.outputs"], heard["outputs"][position][places]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert kept[f"layers.{layer}.inputs"].dtype == torch.float32


def test_report_tells_how_the_text_was_drawn(collected):
    out, metrics, _ = collected
    report = json.loads((out / "sampling_report.json").read_text())
    assert report["tokens"] == 600
    assert report["warnings"] == []
    domain = report["sets"]["domain"]
    assert domain["tokens"] == domain["wanted_tokens"] == 450
    assert domain["sampling"]["chosen"]["kl_to_pool_nats"] >= 0
    assert domain["sources"][0]["records"] == 60
    assert 0 < domain["sources"][0]["other_part"] < 30
    assert metrics["router_entropy_nats"] > 0


def test_the_same_settings_give_the_same_bytes(checkpoint, sets, collected, tmp_path):
    out, _, settings = collected
    collect(checkpoint, sets, settings, tmp_path, dtype=torch.float32)
    for name in ("router_stats.safetensors", "moe_inputs.safetensors", "sampling_report.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_batch_size_changes_nothing_but_rounding(checkpoint, sets, collected, tmp_path):
    out, _, settings = collected
    changed = settings.model_copy(update={"batch_size": 7, "keep_probabilities": False, "keep_inputs": 0})
    collect(checkpoint, sets, changed, tmp_path, dtype=torch.float32)
    one, other = RouterStatistics.load(out)[0], RouterStatistics.load(tmp_path)[0]
    torch.testing.assert_close(one.covariance(), other.covariance(), rtol=0, atol=1e-7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router_stats.safetensors", "sampling_report.json"]


def test_more_tokens_than_there_are_uses_all_and_says_so(checkpoint, sets, tmp_path, caplog):
    settings = SETTINGS.model_copy(update={"tokens": 1_000_000, "keep_probabilities": 100})
    with caplog.at_level(logging.WARNING):
        metrics = collect(checkpoint, {"domain": sets["domain"]}, settings, tmp_path, dtype=torch.float32, part="all")
    assert "data set 'domain' holds" in caplog.text
    assert "1,000,000 were wanted; all of them are used" in caplog.text
    report = json.loads((tmp_path / "sampling_report.json").read_text())
    assert report["warnings"] == [caplog.records[0].getMessage()]
    assert metrics["tokens"] == report["tokens"] > 3_000
    assert len(np.load(tmp_path / "router_probabilities.npz")["probabilities"]) == 100


def test_a_converted_model_is_asked_as_its_base(checkpoint, sets, collected, tmp_path):
    model = load(checkpoint, dtype=torch.float32)
    checkpoint.family.hook.nexus_attach_shared_expert(model=model, width=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared_expert.down_proj.weight" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path / "converted")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "converted" / name).write_bytes((checkpoint.folder / name).read_bytes())
    out, _, settings = collected
    (tmp_path / "out").mkdir()
    collect(open_checkpoint(tmp_path / "converted"), sets, settings, tmp_path / "out", dtype=torch.float32)
    base, converted = (RouterStatistics.load(folder)[0] for folder in (out, tmp_path / "out"))
    torch.testing.assert_close(base.covariance(), converted.covariance(), rtol=0, atol=1e-7)


def test_routers_that_are_not_finite_stop_the_stage(checkpoint, sets, tmp_path, monkeypatch):
    def damaged(*arguments, **keywords):
        model = load(*arguments, **keywords)
        checkpoint.family.hook.nexus_moe_blocks(model=model)[1].router.weight.data[0, 0] = float("nan")
        return model

    monkeypatch.setattr("nexus_core.stages.collect.load", damaged)
    with pytest.raises(StageError, match="router of layer 1 gave numbers that are not finite"):
        collect(checkpoint, sets, SETTINGS, tmp_path, dtype=torch.float32)


def test_unknown_sets_are_refused(checkpoint, sets, tmp_path):
    settings = SETTINGS.model_copy(update={"data": {"domian": 1.0}})
    with pytest.raises(DataError, match="'domian', which is not there; did you mean 'domain'"):
        collect(checkpoint, sets, settings, tmp_path)


def test_the_embedded_model_routes_its_own_data(tmp_path):
    sets = {name: [Source(path=f"embedded:{name}")] for name in ("arithmetic", "prose")}
    settings = Collect(tokens=4_000, sequence_length=128)
    metrics = collect(open_checkpoint("embedded:tiny-gpt-oss"), sets, settings, tmp_path, dtype=torch.float32)
    assert metrics["tokens"] == 4_000
    assert 0.2 < metrics["router_entropy_share_of_even"] < 1
    report = json.loads((tmp_path / "sampling_report.json").read_text())
    for entry in report["sets"].values():
        assert entry["sampling"]["chosen"]["kl_to_pool_nats"] < entry["sampling"]["random"]["kl_to_pool_nats"]


def test_key_is_made_of_the_section_and_the_data_it_uses(sets):
    from nexus_core.recipe.schema import Recipe

    data = {name: [source.model_dump() for source in sources] for name, sources in sets.items()}
    recipe = {"schema": 1, "model": {"path": "some/model"}, "data": data, "collect": {"data": {"domain": 1.0}}}
    settings = STAGE.settings(Recipe.model_validate(recipe))
    assert list(settings["data"]) == ["domain"]
    assert settings["data"]["domain"][0]["path"] == sets["domain"][0].path
    assert settings["collect"]["tokens"] == 1_000_000
    json.dumps(settings)


def test_command(checkpoint, sets, tmp_path, capsys):
    path = sets["domain"][0].path
    flags = ["--tokens", "200", "--sequence-length", "32", "--keep-probabilities", "64", "--out", str(tmp_path / "out")]
    command = ["collect", str(checkpoint.folder), "--data", path, "--data", f"general={path}", *flags, "--json"]
    nexus.main(command, "nexus", standalone_mode=False)
    said = capsys.readouterr()
    answer = json.loads(said.out.splitlines()[-1])
    assert answer["status"] == "done"
    assert answer["metrics"]["tokens"] == 200
    assert "router_probabilities.npz: 64 tokens will take" in said.err
    _, metadata = RouterStatistics.load(tmp_path / "out")
    assert metadata["tokens_per_set"] == {"data": 100, "general": 100}


def test_a_command_that_cannot_be_carried_out_writes_nothing(checkpoint, tmp_path):
    command = ["collect", str(checkpoint.folder), "--data", "nosuch.jsonl", "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"nosuch.jsonl: there is no such file"):
        nexus.main(command, "nexus", standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_devices_and_types():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert compute_dtype("auto", "cpu") == torch.float32
    assert compute_dtype("auto", "cuda:1") == torch.bfloat16
    assert compute_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(NexusError, match="device 'gpu' is not known to torch"):
        choose_device("gpu")
    with pytest.raises(NexusError, match="device 'cuda:99' is not there"):
        choose_device("cuda:99")
    with pytest.raises(NexusError, match="compute type 'float8' is not known"):
        compute_dtype("float8", "cpu")


def test_a_gpu_chosen_by_number_is_the_one_that_libraries_take(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [choose_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    assert taken == [torch.device("cuda:1")]


@pytest.mark.gpu
def test_statistics_on_a_gpu_are_those_of_the_cpu(checkpoint, sets, collected, tmp_path):
    out, _, settings = collected
    collect(checkpoint, sets, settings, tmp_path, device="cuda", dtype=torch.float32)
    one, other = RouterStatistics.load(out)[0], RouterStatistics.load(tmp_path)[0]
    torch.testing.assert_close(one.covariance(), other.covariance(), rtol=0, atol=1e-5)
