"""`nexus select`: statistics to a selection, plots and a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from pydantic import BaseModel, ConfigDict
from sklearn.decomposition import PCA as SklearnPCA

from nexus_core import hookimpl
from nexus_core.plugins import installed
from nexus_core.recipe import recipe_from
from nexus_core.report.overlap import comparison_figures
from nexus_core.report.selection import figures
from nexus_core.select import LayerSelection, LayerStatistics, Ranking, Selection, read_selection
from nexus_core.stages.select import select
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.types import RouterOutput, Strategy

LAYERS, EXPERTS, TOKENS = (0, 2), 32, 2000


def router_logits(layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    factors = torch.randn(TOKENS, 5, generator=generator) @ torch.randn(5, EXPERTS, generator=generator)
    return factors + torch.randn(EXPERTS, generator=generator)


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """A folder as collect leaves it, of a router that is known."""
    return collect_into(tmp_path)


def collect_into(tmp_path: Path, expert_norms: bool = False) -> Path:
    statistics = RouterStatistics.zeros(LAYERS, EXPERTS, expert_norms=expert_norms)
    for position, layer in enumerate(LAYERS):
        logits_TE = router_logits(layer)
        chosen = logits_TE.topk(4)
        statistics.update(position, RouterOutput(logits_TE, chosen.values.softmax(-1), chosen.indices))
    if statistics.output_norm_sum is not None:
        statistics.output_norm_sum += torch.arange(EXPERTS) * statistics.topk_count
    folder = tmp_path / "stats"
    folder.mkdir()
    statistics.save(folder / "router_stats.safetensors", {"model": str(tmp_path / "some-model")})
    return folder


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
        (["--top-k", "8,8,8"], "top_k is a list of 3, but the statistics are of 2 layers"),
        (["--top-k", "8,40"], "top_k is 40, but layer 2 has 32 experts"),
        (["--top-k", "cumulative=80"], "top_k.cumulative: must be a number above 0 to 1, got 80"),
        (["--strategy", "saliency"], "needs the norms of the experts' outputs, which were not gathered; collect again"),
        (["--compare", "pca"], "names no two strategies"),
        (["--compare", "pca,frequncy"], "did you mean 'frequency'"),
        (["--compare", "pca,random", "--strategy", "pca"], "give one of the two"),
        (["--compare", "pca,random", "--set", "component=3"], "did you mean 'components'"),
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


def test_saliency_goes_by_the_norms_that_collect_gathered(tmp_path: Path) -> None:
    stats = collect_into(tmp_path, expert_norms=True)

    assert call("select", stats, "--strategy", "saliency", "--top-k", "3", "--out", tmp_path / "out") == 0

    # the fixture's mean norm of expert e is e, for those that were chosen at all
    chosen = read_selection(tmp_path / "out").layers[0].experts
    assert chosen == tuple(sorted(chosen, reverse=True))
    assert chosen[-1] > EXPERTS / 2


def test_layers_may_have_numbers_of_their_own_or_a_share_to_reach(collected: Path, tmp_path: Path) -> None:
    call("select", collected, "--top-k", "3,5", "--out", tmp_path / "list")
    call("select", collected, "--top-k", "cumulative=0.5", "--out", tmp_path / "share")

    listed, share = read_selection(tmp_path / "list"), read_selection(tmp_path / "share")
    assert [len(layer.experts) for layer in listed.layers] == [3, 5]
    assert json.loads((tmp_path / "list/selection.json").read_text())["top_k"] == [3, 5]
    assert json.loads((tmp_path / "share/selection.json").read_text())["top_k"] == {"cumulative": 0.5}
    for layer in share.layers:
        held = [layer.importance[expert] for expert in layer.experts]
        assert sum(held[:-1]) < 0.5 <= sum(held)


def test_comparison_tells_how_far_strategies_agree(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--compare", "pca,frequency,diverse", "--top-k", "6", "--set", "components=3"]
    assert call("select", collected, *options, "--out", out) == 0

    printed = capsys.readouterr().out
    stored = json.loads((out / "comparison.json").read_text())
    selections = {name: read_selection(out / name) for name in ("pca", "frequency", "diverse")}
    assert list(stored["strategies"]) == list(selections)
    assert selections["pca"].parameters == {"components": 3}
    assert selections["pca"].statistics == "../../stats"
    for pair in stored["overlap"]:
        one, other = (selections[name] for name in pair["strategies"])
        by_layer = [
            len(set(a.experts) & set(b.experts)) / len(set(a.experts) | set(b.experts))
            for a, b in zip(one.layers, other.layers, strict=True)
        ]
        assert pair["by_layer"] == pytest.approx(by_layer)
        assert pair["mean"] == pytest.approx(sum(by_layer) / len(by_layer))
        assert "-".join(pair["strategies"]) in printed
        assert f"{pair['mean']:.1%}" in printed
    assert sorted(path.name for path in out.glob("*.png")) == [
        "chosen_experts.png",
        "overlap.png",
        "overlap_by_layer.png",
    ]


def test_comparison_gives_one_json_object(collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = "pca,frequency,gate_mass,diverse,kmeans,random"
    assert call("select", collected, "--compare", every, "--json", "--out", tmp_path / "out") == 0

    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["status"] == "done"
    assert len(answer["overlap"]) == 15
    assert answer["layers"] == list(LAYERS)


@pytest.mark.parametrize(("layers", "experts", "strategies"), [(1, 2, 2), (36, 128, 7)])
def test_pictures_of_a_comparison_of_any_size_have_titles_and_labels(
    layers: int, experts: int, strategies: int
) -> None:
    equal = (1 / experts,) * experts
    chosen = {
        f"strategy_{number}": Selection(
            strategy="x",
            top_k=2,
            layers=tuple(
                LayerSelection(layer=layer, experts=(0, 1 + number % (experts - 1)), importance=equal)
                for layer in range(layers)
            ),
        )
        for number in range(strategies)
    }

    pictures = comparison_figures(chosen)

    assert list(pictures) == ["overlap", "overlap_by_layer", "chosen_experts"]
    for figure in pictures.values():
        assert figure.axes[0].get_title(loc="left")
    legend = pictures["overlap_by_layer"].axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) <= 7


def test_a_plugins_strategy_is_chosen_by_its_name_and_parameters(collected: Path, tmp_path: Path) -> None:
    class Parameters(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        favourite: int

    def favourite(statistics: LayerStatistics, parameters: Parameters, generator: np.random.Generator) -> Ranking:
        importance_E = np.full(statistics.experts, 0.5 / (statistics.experts - 1))
        importance_E[parameters.favourite] = 0.5
        return Ranking(importance_E)

    class Plugin:
        @hookimpl
        def nexus_selection_strategies(self) -> list[Strategy]:
            return [Strategy("favourite", favourite, "by taste", parameters=Parameters)]

    installed().register(Plugin(), "taste", "test")
    try:
        options = ["--strategy", "favourite", "--set", "favourite=7", "--top-k", "2"]
        assert call("select", collected, *options, "--out", tmp_path / "out") == 0
        recipe = recipe_from(
            {
                "schema": 1,
                "model": {"path": "embedded:tiny-gpt-oss"},
                "data": {"domain": [{"path": "x.jsonl"}]},
                "select": {"strategy": "favourite", "favourite": 7, "top_k": {"cumulative": 0.5}},
            },
            name="taste",
        )
        (tmp_path / "recipe").mkdir()
        select(collected, recipe.select, tmp_path / "recipe")
    finally:
        installed().unregister("taste")

    assert read_selection(tmp_path / "out").layers[0].experts == (7, 0)
    assert read_selection(tmp_path / "recipe").layers[0].experts == (7,)
