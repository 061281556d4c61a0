"""Router statistics to the experts that each layer's shared expert is built from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nexus_core.checkpoint.writer import write_json
from nexus_core.errors import SelectionError
from nexus_core.recipe.schema import Recipe, Select
from nexus_core.report.overlap import comparison_figures
from nexus_core.report.selection import figures
from nexus_core.select import LayerStatistics, Selection, choose_experts, write_selection
from nexus_core.select.overlap import explained_share, overlap, routed_share
from nexus_core.select.selection import TopK
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.strategies import EXPERT_NORMS, choose_strategy
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.types import Strategy

COMPARISON_NAME = "comparison.json"


def select(statistics: Path, settings: Select, out: Path) -> Metrics:
    """Rank every layer's experts, choose the first of them, and write `selection.json` and its plots into `out`.

    statistics: the file that collect wrote, or the folder it lies in. Raises SelectionError if the layers have fewer
    experts than are to be chosen, or the statistics are of too few tokens or lack what the strategy needs.
    """
    selection = choose_in_every_layer(statistics, settings, out)
    write_selection(selection, out)
    for name, figure in figures(selection).items():
        figure.savefig(out / f"{name}.png")
    return _metrics(selection)


def compare(statistics: Path, settings: Mapping[str, Select], out: Path) -> dict[str, Any]:
    """Choose by several strategies from the same statistics and write how far they agree into `out`.

    settings: by a name for each. Writes `comparison.json`, whose content it returns, its plots, and every selection
    into a folder of its name. Raises what `select` does.
    """
    # A folder deep, where each selection will lie.
    selections = {name: choose_in_every_layer(statistics, each, out / name) for name, each in settings.items()}
    overlap_LSS = overlap(list(selections.values()))
    for name, selection in selections.items():
        (out / name).mkdir()
        write_selection(selection, out / name)
    for name, figure in comparison_figures(selections).items():
        figure.savefig(out / f"{name}.png")
    pairs = list(combinations(range(len(selections)), 2))
    names = list(selections)
    first = next(iter(selections.values()))
    by_layer = layer_statistics(RouterStatistics.load(statistics)[0], statistics)
    comparison = {
        "strategies": {
            name: {"path": name, "metrics": _metrics(each) | _stand_for(each, by_layer)}
            for name, each in selections.items()
        },
        "layers": [layer.layer for layer in first.layers],
        "overlap": [
            {
                "strategies": [names[a], names[b]],
                "mean": float(overlap_LSS[:, a, b].mean()),
                "by_layer": overlap_LSS[:, a, b].tolist(),
            }
            for a, b in pairs
        ],
    }
    write_json(out / COMPARISON_NAME, comparison)
    return comparison


def choose_in_every_layer(statistics: Path, settings: Select, out: Path) -> Selection:
    """The experts that a strategy chooses, given the statistics. out: the folder the selection will lie in.

    Raises what `select` does.
    """
    strategy, parameters = choose_strategy("selection", settings.strategy, settings.parameters)
    stats, metadata = RouterStatistics.load(statistics)
    _refuse_missing(strategy, stats, statistics)
    counts = _top_k_by_layer(settings, stats)
    layers = []
    for layer, top_k in zip(layer_statistics(stats, statistics), counts, strict=True):
        layer = replace(layer, wanted=top_k if isinstance(top_k, int) else None)
        # A generator per layer, so that what is drawn for one does not depend on which others there are.
        generator = np.random.default_rng([settings.seed, layer.layer])
        layers.append(choose_experts(layer.layer, strategy.function(layer, parameters, generator), top_k))
    return Selection(
        strategy=settings.strategy,
        top_k=tuple(settings.top_k) if isinstance(settings.top_k, list) else settings.top_k,
        layers=tuple(layers),
        parameters=parameters.model_dump(mode="json") if parameters else {},
        seed=settings.seed,
        tokens=stats.tokens,
        model=_without_place(metadata.get("model")),
        # Relative, so that both can be moved together, and no path of this machine ends up in the file.
        statistics=os.path.relpath(_folder_of(statistics), out.resolve()),
    )


def _top_k_by_layer(settings: Select, stats: RouterStatistics) -> Sequence[TopK]:
    if not isinstance(settings.top_k, list):
        return [settings.top_k] * len(stats.layers)
    if len(settings.top_k) != len(stats.layers):
        raise SelectionError(
            f"top_k is a list of {len(settings.top_k)}, but the statistics are of {len(stats.layers)} layers; give one "
            "number for each, or one for all"
        )
    return settings.top_k


def _refuse_missing(strategy: Strategy, stats: RouterStatistics, where: Path) -> None:
    if EXPERT_NORMS in strategy.needs and stats.output_norm_sum is None:
        raise SelectionError(
            f"{where}: selection strategy '{strategy.name}' needs the norms of the experts' outputs, which were not "
            "gathered; collect again with expert_norms (--expert-norms)"
        )


def _metrics(selection: Selection) -> Metrics:
    top_4_shares = [layer.top_share["4"] for layer in selection.layers]
    return {
        "layers": len(selection.layers),
        "experts_chosen_per_layer": float(np.mean([len(layer.experts) for layer in selection.layers])),
        "top_4_share_mean": float(np.mean(top_4_shares)),
        "top_4_share_min": min(top_4_shares),
        "top_4_share_max": max(top_4_shares),
    }


def _stand_for(selection: Selection, by_layer: Sequence[LayerStatistics]) -> Metrics:
    chosen = [(statistics, layer.experts) for statistics, layer in zip(by_layer, selection.layers, strict=True)]
    return {
        "routed_share_mean": float(np.mean([routed_share(*each) for each in chosen])),
        "explained_share_mean": float(np.mean([explained_share(*each) for each in chosen])),
    }


def layer_statistics(stats: RouterStatistics, where: Path) -> list[LayerStatistics]:
    """The statistics of each layer, ascending. Raises SelectionError if a covariance needs more tokens."""
    if stats.tokens < 2:
        raise SelectionError(
            f"{where}: holds statistics of {stats.tokens} tokens; collect over at least 2, better 100,000"
        )
    mean_LE, covariance_LEE = stats.mean().numpy(), stats.covariance().numpy()
    topk_count_LE, gate_mass_LE = stats.topk_count.numpy(), stats.gate_mass.numpy()
    norms_LE = stats.output_norm_sum
    return [
        LayerStatistics(
            layer=layer,
            tokens=stats.tokens,
            mean=mean_LE[position],
            covariance=covariance_LEE[position],
            topk_count=topk_count_LE[position],
            gate_mass=gate_mass_LE[position],
            output_norm_sum=None if norms_LE is None else norms_LE[position].numpy(),
        )
        for position, layer in enumerate(stats.layers)
    ]


def _without_place(model: str | None) -> str | None:
    # A Hub id or embedded name says what a model is; of a folder only the last part does.
    return Path(model).name if model and Path(model).is_absolute() else model


def _folder_of(statistics: Path) -> Path:
    return (statistics if statistics.is_dir() else statistics.parent).resolve()


def _settings(recipe: Recipe) -> dict[str, object]:
    return recipe.select.model_dump(mode="json")


def _run(context: StageContext) -> Metrics:
    return select(context.inputs["collect"], context.recipe.select, context.out)


STAGE = Stage(name="select", version=2, inputs=("collect",), settings=_settings, run=_run)
