"""Conversion of a real, very small checkpoint: what it adds, and everything it must leave as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from safetensors.torch import save_file

import nexus_core
from nexus_core.additions import SharedExpert
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.cli.convert import find_statistics
from nexus_core.errors import CheckpointError, SelectionError, UsageError
from nexus_core.merge import STRATEGIES
from nexus_core.merge.experts import tensors
from nexus_core.pipeline.store import atomic_folder
from nexus_core.recipe.schema import Convert
from nexus_core.select import LayerSelection, Selection, write_selection
from nexus_core.stages.convert import MOE_INPUTS_NAME, SALIENCY_NAME, convert
from nexus_core.statistics.saliency import NeuronSaliency, SaliencyFile

LAYERS, EXPERTS, HIDDEN = 2, 8, 64
CHOSEN = {0: (5, 2, 7), 1: (0, 3)}
IMPORTANCE = (0.05, 0.05, 0.2, 0.15, 0.1, 0.2, 0.1, 0.15)
MERGES = [strategy.name for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models") / "base"
    write_tiny_checkpoint(folder, layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, vocabulary=300, tokenizer=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return open_checkpoint(folder)


def selection(chosen: dict[int, tuple[int, ...]] = CHOSEN) -> Selection:
    layers = tuple(
        LayerSelection(layer=layer, experts=experts, importance=IMPORTANCE) for layer, experts in chosen.items()
    )
    return Selection(strategy="pca", top_k="auto", layers=layers)


def converted(
    base: Checkpoint,
    out: Path,
    *,
    moe_inputs: Path | None = None,
    statistics: Path | None = None,
    learn: Sequence[str] | None = ("domain",),
    **settings: object,
) -> Checkpoint:
    """statistics: a folder with moe inputs and neuron saliency."""
    out.mkdir(parents=True)
    found = {path.name: path for path in statistics.iterdir()} if statistics else {}
    convert(
        base,
        selection(),
        Convert(**settings),
        out,
        moe_inputs=moe_inputs or found.get(MOE_INPUTS_NAME),
        neuron_saliency=found.get(SALIENCY_NAME),
        learn=learn,
    )
    return open_checkpoint(out)


@pytest.fixture(scope="module")
def base_logits(base: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return nexus_core.load(base, dtype=torch.float32)(input_ids()).logits


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What collect would leave: random inputs and outputs of the layers, and random saliency on two sets."""
    folder = tmp_path_factory.mktemp("statistics")
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in ("inputs", "outputs")]
    save_file({name: torch.randn(40, HIDDEN, generator=generator) for name in names}, folder / MOE_INPUTS_NAME)
    saliency = NeuronSaliency.zeros(range(LAYERS), ["domain", "general"], EXPERTS, 32)
    for tensor in (saliency.activity, saliency.output_norm):
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    saliency.tokens += 100
    saliency.save(folder / SALIENCY_NAME, {})
    return folder


def report_of(checkpoint: Checkpoint) -> dict:
    return json.loads((checkpoint.folder / "convert_report.json").read_text())


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every tensor's bytes, with its type and shape, by name."""
    reader = CheckpointReader(checkpoint.folder)
    return {
        name: hashlib.sha256(
            f"{entry.dtype}{entry.shape}".encode() + entry.shard.read_bytes()[entry.start : entry.end]
        ).hexdigest()
        for name, entry in reader.entries.items()
    }


def shared_experts(model: torch.nn.Module) -> list[SharedExpert]:
    return [module for module in model.modules() if isinstance(module, SharedExpert)]


def input_ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def test_every_tensor_of_the_base_has_the_same_sha256_after_conversion(base: Checkpoint, tmp_path: Path) -> None:
    before = digests(base)
    after = digests(converted(base, tmp_path / "out", start="full"))

    assert {name: after[name] for name in before} == before
    routed = [name for name in before if ".experts." in name]
    assert len(routed) == LAYERS * 6
    assert digests(base) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_zero_start_the_logits_are_the_bases_to_the_bit(
    base: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    out = converted(base, tmp_path / "out", start="zero")
    with torch.no_grad():
        expected = nexus_core.load(base, dtype=dtype)(input_ids()).logits
        logits = nexus_core.load(out, dtype=dtype)(input_ids()).logits

    assert torch.equal(logits, expected)
    assert all(expert.gate_proj.weight.count_nonzero() for expert in shared_experts(nexus_core.load(out)))


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_of_every_width_leaves_the_logits_to_the_bit_at_a_zero_start(
    base: Checkpoint, base_logits: torch.Tensor, statistics: Path, tmp_path: Path, merge: str, width: int
) -> None:
    out = converted(base, tmp_path / "out", statistics=statistics, merge=merge, width=width, start="zero")

    model = nexus_core.load(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids()).logits, base_logits)
    for shared in shared_experts(model):
        assert shared.gate_proj.weight.shape == (width, HIDDEN)
        assert shared.gate_proj.weight.any()
    layers = report_of(out)["layers"]
    assert all(layer["relative_output_change"] == 0 for layer in layers)
    assert all(layer["at_full_start"]["relative_change"] > 0 for layer in layers)
    assert (out.folder / "output_change.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("merge", [name for name in MERGES if name != "random"])
def test_a_width_that_makes_no_sense_is_refused_before_anything_is_written(
    base: Checkpoint, statistics: Path, tmp_path: Path, merge: str
) -> None:
    width = 1024 if merge == "neurons" else 96

    with pytest.raises(UsageError, match=f"width is {width}, .* write at most"):
        converted(base, tmp_path / "out", statistics=statistics, merge=merge, width=width)
    assert list((tmp_path / "out").iterdir()) == []


def test_experts_read_by_rows_and_whole_make_the_same(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus_core.merge.experts.TILE_NUMBERS", 5 * HIDDEN)
    by_rows = digests(converted(base, tmp_path / "rows", merge="aligned", start="full"))
    monkeypatch.setattr("nexus_core.plugins.Family.answers", lambda self, hook_name: False)
    whole = digests(converted(base, tmp_path / "whole", merge="aligned", start="full"))

    assert by_rows == whole


def test_with_a_full_start_the_logits_change_and_the_teacher_is_still_the_base(
    base: Checkpoint, tmp_path: Path
) -> None:
    model = nexus_core.load(converted(base, tmp_path / "out", start="full"), dtype=torch.float32)
    with torch.no_grad():
        expected = nexus_core.load(base, dtype=torch.float32)(input_ids()).logits
        assert not torch.allclose(model(input_ids()).logits, expected)
        with nexus_core.as_teacher(model):
            assert torch.equal(model(input_ids()).logits, expected)


@pytest.mark.parametrize("merge", ["mean", "top1"])
def test_the_shared_expert_is_the_merge_of_the_selected_experts(base: Checkpoint, tmp_path: Path, merge: str) -> None:
    model = nexus_core.load(converted(base, tmp_path / "out", merge=merge, start="full"))

    for (layer, chosen), shared in zip(CHOSEN.items(), shared_experts(model), strict=True):
        experts = [
            tensors(
                base.family.hook.nexus_read_expert(
                    reader=base.reader, config=base.config, layer=layer, expert=expert, dtype=torch.float32
                )
            )
            for expert in (chosen if merge == "mean" else chosen[:1])
        ]
        for name, linear in (("gate", shared.gate_proj), ("up", shared.up_proj), ("down", shared.down_proj)):
            for suffix, parameter in (("", linear.weight), ("_bias", linear.bias)):
                expected = torch.stack([expert[name + suffix] for expert in experts]).mean(dim=0)
                torch.testing.assert_close(parameter.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-6)


def test_a_factor_start_scales_the_shared_experts_output(base: Checkpoint, tmp_path: Path) -> None:
    full = nexus_core.load(converted(base, tmp_path / "full", start="full"), dtype=torch.float32)
    half = nexus_core.load(converted(base, tmp_path / "half", start=0.5), dtype=torch.float32)
    hidden_TD = torch.randn(5, HIDDEN)

    for whole, scaled in zip(shared_experts(full), shared_experts(half), strict=True):
        torch.testing.assert_close(scaled(hidden_TD), whole(hidden_TD) / 2)


def test_tokenizer_chat_template_and_generation_settings_come_along(base: Checkpoint, tmp_path: Path) -> None:
    out = converted(base, tmp_path / "out").folder

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base.folder / name).read_bytes()
    assert nexus_core.load(out).generation_config.eos_token_id == [2, 5]


def test_no_file_names_a_place_on_this_machine(base: Checkpoint, tmp_path: Path) -> None:
    out = converted(base, tmp_path / "out").folder

    for path in out.iterdir():
        assert not path.is_symlink()
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(base.folder).encode() not in path.read_bytes()


def test_the_converted_folder_works_after_the_base_is_gone_and_after_a_move(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny_checkpoint(tmp_path / "base", layers=LAYERS, experts=EXPERTS))
    ids = input_ids() % 128
    with torch.no_grad():
        expected = nexus_core.load(base)(ids).logits
    converted(base, tmp_path / "out")

    for path in base.folder.iterdir():
        path.unlink()
    (tmp_path / "out").rename(tmp_path / "moved")

    with torch.no_grad():
        assert torch.equal(nexus_core.load(tmp_path / "moved")(ids).logits, expected)


def test_report_tells_sizes_parameters_and_what_was_left_out(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny_checkpoint(tmp_path / "base", layers=LAYERS, experts=EXPERTS))
    out = converted(base, tmp_path / "out")
    report = report_of(out)

    trainable = sum(
        parameter.numel() for expert in shared_experts(nexus_core.load(out)) for parameter in expert.parameters()
    )
    assert report["trainable_parameters"] == trainable
    assert report["bytes_before"] == sum(entry.stored_bytes for entry in base.reader.entries.values())
    assert report["bytes_after"] == sum(entry.stored_bytes for entry in out.reader.entries.values())
    assert [layer["experts"] for layer in report["layers"]] == [list(experts) for experts in CHOSEN.values()]
    assert [sentence.partition(":")[0] for sentence in report["left_out"]] == ["relative output change", "tokenizer"]


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


def test_a_converted_model_is_not_converted_again(base: Checkpoint, tmp_path: Path) -> None:
    once = converted(base, tmp_path / "once")

    with pytest.raises(CheckpointError, match="has shared experts already, of width 32; convert its base"):
        converted(once, tmp_path / "twice")
    assert list((tmp_path / "twice").iterdir()) == []


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({0: (1,)}, "no layer 1"),
        ({0: (1,), 1: (1,), 2: (1,)}, "in layer 2"),
        ({0: (1,), 1: (8,)}, "expert 8.* experts 0-7"),
    ],
)
def test_a_selection_of_another_model_is_refused_before_anything_is_written(
    base: Checkpoint, tmp_path: Path, chosen: dict[int, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        convert(base, selection(chosen), Convert(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_behind(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nexus_core.stages.convert.write_index", interrupt)

    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        convert(base, selection(), Convert(), folder)
    assert list(tmp_path.iterdir()) == []
