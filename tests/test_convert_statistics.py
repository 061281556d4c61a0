"""What conversion makes of collected statistics: salient neurons, and the change of the layers' outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversions import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    converted,
    report_of,
    selection,
    shared_experts,
    write_base,
    write_statistics,
)
from safetensors.torch import save_file

import nexus_core
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.cli.convert import find_statistics
from nexus_core.errors import UsageError
from nexus_core.select import write_selection
from nexus_core.stages.convert import MOE_INPUTS_NAME, SALIENCY_NAME
from nexus_core.statistics.saliency import NeuronSaliency, SaliencyFile


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_statistics(tmp_path_factory.mktemp("statistics"))


def test_neurons_are_those_most_salient_on_what_is_learnt(base: Checkpoint, statistics: Path, tmp_path: Path) -> None:
    opened = SaliencyFile(statistics / SALIENCY_NAME)
    taken = {}
    for contrast in (0.0, 1.0):
        out = converted(
            base, tmp_path / f"out{contrast}", statistics=statistics, merge="neurons", contrast=contrast, start="full"
        )
        assert report_of(out)["data"] == {"learnt": ["domain"], "kept": ["general"]}
        shared = shared_experts(nexus_core.load(out))
        for layer, module in enumerate(shared):
            saliency_EF = opened.layer(layer, ["domain"], ["general"]).contrasted(contrast)
            places = sorted(saliency_EF.ravel().argsort()[::-1][:32].tolist())
            for row, place in enumerate(places):
                expert, neuron = divmod(place, 32)
                source = base.family.hook.nexus_read_expert(
                    reader=base.reader, config=base.config, layer=layer, expert=expert, dtype=torch.bfloat16
                )
                assert torch.equal(module.gate_proj.weight[row], source.gate[neuron])
                assert torch.equal(module.down_proj.weight[:, row], source.down[:, neuron])
        taken[contrast] = [module.gate_proj.weight for module in shared]
    assert not torch.equal(taken[0.0][0], taken[1.0][0])


def test_saliency_of_several_sets_needs_to_know_which_is_learnt(
    base: Checkpoint, statistics: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds the data sets domain, general; say with --learn"):
        converted(base, tmp_path / "a", statistics=statistics, learn=None, merge="neurons")
    with pytest.raises(UsageError, match="saliency on domain, general, not on math, which is to be learnt"):
        converted(base, tmp_path / "b", statistics=statistics, learn=["math"], merge="neurons")
    with pytest.raises(UsageError, match=r"'neurons' needs neuron saliency .*--statistics"):
        converted(base, tmp_path / "c", merge="neurons")
    # Whoever does not read it need not say.
    converted(base, tmp_path / "d", statistics=statistics, learn=None, merge="mean")


def test_saliency_of_another_model_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = NeuronSaliency.zeros((0, 1), ["domain"], EXPERTS, 48)
    other.save(tmp_path / "other" / SALIENCY_NAME, {})

    with pytest.raises(UsageError, match=r"48 neurons wide, but .* 32 wide; give the statistics of this model"):
        converted(base, tmp_path / "out", statistics=tmp_path / "other", merge="neurons")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("start", "factor"), [("zero", 0.0), ("full", 1.0), (0.25, 0.25)])
def test_output_change_is_what_the_models_own_shared_expert_does_to_the_kept_inputs(
    base: Checkpoint, tmp_path: Path, start: str | float, factor: float
) -> None:
    kept = {
        f"layers.{layer}.{part}": torch.randn(50, HIDDEN) for layer in range(LAYERS) for part in ("inputs", "outputs")
    }
    save_file(kept, tmp_path / MOE_INPUTS_NAME)
    full = nexus_core.load(converted(base, tmp_path / "full", start="full"), dtype=torch.float32)

    report = report_of(converted(base, tmp_path / "out", start=start, moe_inputs=tmp_path / MOE_INPUTS_NAME))

    assert report["left_out"] == []
    for layer, shared in zip(report["layers"], shared_experts(full), strict=True):
        inputs_ND, outputs_ND = (kept[f"layers.{layer['layer']}.{part}"] for part in ("inputs", "outputs"))
        with torch.no_grad():
            added_ND = shared(inputs_ND)
        change = float(added_ND.norm() / outputs_ND.norm())
        cosine = float(torch.cosine_similarity(added_ND, outputs_ND, dim=1).mean())
        assert layer["at_full_start"]["relative_change"] == pytest.approx(change, rel=0.01)  # stored in bfloat16
        assert layer["at_full_start"]["cosine"] == pytest.approx(cosine, abs=0.01)
        assert layer["relative_output_change"] == pytest.approx(factor * change, rel=0.01)


def test_kept_inputs_are_found_through_the_selection_and_a_wrong_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "chosen").mkdir()
    found = tmp_path / "stats" / MOE_INPUTS_NAME
    found.touch()
    made_from_stats = selection().model_copy(update={"statistics": "../stats"})
    file = write_selection(made_from_stats, tmp_path / "chosen")

    assert find_statistics(None, made_from_stats, file) == find_statistics(None, made_from_stats, file.parent)
    assert find_statistics(None, made_from_stats, file)[MOE_INPUTS_NAME].samefile(found)
    assert find_statistics(None, selection(), file) == {}
    with pytest.raises(UsageError, match=r"chosen: holds neither moe_inputs"):
        find_statistics(tmp_path / "chosen", selection(), file)


def test_inputs_of_another_model_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    save_file({"layers.0.inputs": torch.ones(4, 32), "layers.0.outputs": torch.ones(4, 32)}, tmp_path / MOE_INPUTS_NAME)

    with pytest.raises(
        UsageError, match=r"'layers.0.inputs' is of shape \[4, 32\].* give the statistics of this model"
    ):
        converted(base, tmp_path / "out", moe_inputs=tmp_path / MOE_INPUTS_NAME)
