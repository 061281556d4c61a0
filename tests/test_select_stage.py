"""`nexus select`: statistics to a selection, plots and a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA

from nexus_core.cli import main
from nexus_core.report.selection import figures
from nexus_core.select import LayerSelection, Selection
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.types import RouterOutput

LAYERS, EXPERTS, TOKENS = (0, 2), 32, 2000


def router_logits(layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    factors = torch.randn(TOKENS, 5, generator=generator) @ torch.randn(5, EXPERTS, generator=generator)
    return factors + torch.randn(EXPERTS, generator=generator)


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """A folder as collect leaves it, of a router that is known."""
    statistics = RouterStatistics.zeros(LAYERS, EXPERTS)
    for position, layer in enumerate(LAYERS):
        logits_TE = router_logits(layer)
        chosen = logits_TE.topk(4)
        statistics.update(position, RouterOutput(logits_TE, chosen.values.softmax(-1), chosen.indices))
    folder = tmp_path / "stats"
    folder.mkdir()
    statistics.save(folder / "router_stats.safetensors", {"model": str(tmp_path / "some-model")})
    return folder


def call(*arguments: object) -> int:
    """Exit code of `nexus ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_streamed_statistics_select_what_sklearn_selects_from_all_probabilities(
    collected: Path, tmp_path: Path
) -> None:
    assert call("select", collected, "--strategy", "pca", "--top-k", "24", "--out", tmp_path / "out") == 0

    stored = json.loads((tmp_path / "out/selection.json").read_text())
    assert (stored["strategy"], stored["top_k"]) == ("pca", 24)
    assert [entry["layer"] for entry in stored["layers"]] == list(LAYERS)
    for entry in stored["layers"]:
        reference = SklearnPCA(n_components=20).fit(router_logits(entry["layer"]).double().softmax(-1).numpy())
        importance_E = np.abs(reference.components_).T @ reference.explained_variance_ratio_
        np.testing.assert_allclose(entry["importance"], importance_E / importance_E.sum(), rtol=0, atol=1e-6)
        assert entry["experts"] == list(np.argsort(-importance_E, kind="stable")[:24])


def test_the_folder_and_the_file_in_it_give_the_same_selection(collected: Path, tmp_path: Path) -> None:
    assert call("select", collected, "--out", tmp_path / "a") == 0
    assert call("select", collected / "router_stats.safetensors", "--out", tmp_path / "b") == 0

    assert (tmp_path / "a/selection.json").read_bytes() == (tmp_path / "b/selection.json").read_bytes()


def test_the_selection_knows_where_it_comes_from_without_naming_a_place_on_this_machine(
    collected: Path, tmp_path: Path
) -> None:
    call("select", collected, "--out", tmp_path / "out")

    stored = json.loads((tmp_path / "out/selection.json").read_text())
    assert (stored["model"], stored["statistics"], stored["tokens"]) == ("some-model", "../stats", TOKENS)
    assert str(tmp_path) not in (tmp_path / "out/selection.json").read_text()


def test_four_plots_come_with_pca_and_three_with_others(collected: Path, tmp_path: Path) -> None:
    call("select", collected, "--out", tmp_path / "pca")
    call("select", collected, "--strategy", "frequency", "--out", tmp_path / "frequency")

    three = ["cumulative_importance.png", "importance.png", "importance_map.png"]
    assert sorted(path.name for path in (tmp_path / "pca").glob("*.png")) == [*three, "variance_explained.png"]
    assert sorted(path.name for path in (tmp_path / "frequency").glob("*.png")) == three


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (8, 16), (36, 128)])
def test_plots_of_any_size_tell_layers_apart(layers: int, experts: int) -> None:
    equal = (1 / experts,) * experts
    chosen = [
        LayerSelection(layer=layer, experts=(0, 1), importance=equal, explained_variance=(0.6, 0.3))
        for layer in range(layers)
    ]

    for figure in figures(Selection(strategy="pca", top_k=2, layers=tuple(chosen))).values():
        axes = figure.axes[0]
        assert axes.get_title(loc="left")
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        labels = axes.get_legend().get_texts() if axes.get_legend() else []
        assert len([label for label in labels if label.get_text().startswith("layer")]) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "33"], "top_k is 33, but layer 0 has 32 experts; choose at most 32, or 'auto'"),
        (["--top-k", "0"], "top_k"),
        (["--top-k", "many"], "auto"),
        (["--strategy", "pcaa"], "did you mean 'pca'"),
        (["--set", "componets=3"], "did you mean"),
        (["--strategy", "frequency", "--set", "components=3"], "components"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_a_sentence(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert call("select", collected, *options, "--out", tmp_path / "out") == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("select", tmp_path, "--out", tmp_path / "out") == 2

    assert "nexus collect" in capsys.readouterr().err


def test_json_gives_path_and_metrics(collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("select", collected, "--top-k", "8", "--json", "--out", tmp_path / "out") == 0

    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["status"] == "done"
    assert answer["path"] == str(tmp_path / "out")
    assert answer["metrics"]["experts_chosen_per_layer"] == 8
