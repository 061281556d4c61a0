"""Router statistics to the experts that each layer's shared expert is built from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from nexus_core.errors import SelectionError
from nexus_core.recipe.schema import Recipe, Select
from nexus_core.report.selection import figures
from nexus_core.select import LayerStatistics, Selection, choose_experts, write_selection
from nexus_core.stages.stage import Metrics, Stage, StageContext
from nexus_core.stages.strategies import choose_strategy
from nexus_core.statistics.moments import RouterStatistics


def select(statistics: Path, settings: Select, out: Path) -> Metrics:
    """Rank every layer's experts, choose the most important, and write `selection.json` and four plots into `out`.

    statistics: the file that collect wrote, or the folder it lies in. Raises SelectionError if the layers have fewer
    experts than are to be chosen, or the statistics are of too few tokens.
    """
    strategy, parameters = choose_strategy("selection", settings.strategy, settings.parameters)
    stats, metadata = RouterStatistics.load(statistics)
    layers = [
        choose_experts(
            layer.layer,
            # A generator per layer, so that what is drawn for one does not depend on which others there are.
            strategy.function(layer, parameters, np.random.default_rng([settings.seed, layer.layer])),
            settings.top_k,
        )
        for layer in layer_statistics(stats, statistics)
    ]
    selection = Selection(
        strategy=settings.strategy,
        top_k=settings.top_k,
        layers=tuple(layers),
        parameters=parameters.model_dump(mode="json") if parameters else {},
        seed=settings.seed,
        tokens=stats.tokens,
        model=_without_place(metadata.get("model")),
        # Relative, so that both can be moved together, and no path of this machine ends up in the file.
        statistics=os.path.relpath(_folder_of(statistics), out.resolve()),
    )
    write_selection(selection, out)
    for name, figure in figures(selection).items():
        figure.savefig(out / f"{name}.png")
    top_4_shares = [layer.top_share["4"] for layer in layers]
    return {
        "layers": len(layers),
        "experts_chosen_per_layer": float(np.mean([len(layer.experts) for layer in layers])),
        "top_4_share_mean": float(np.mean(top_4_shares)),
        "top_4_share_min": min(top_4_shares),
        "top_4_share_max": max(top_4_shares),
    }


def layer_statistics(stats: RouterStatistics, where: Path) -> list[LayerStatistics]:
    """The statistics of each layer, ascending. Raises SelectionError if a covariance needs more tokens."""
    if stats.tokens < 2:
        raise SelectionError(
            f"{where}: holds statistics of {stats.tokens} tokens; collect over at least 2, better 100,000"
        )
    mean_LE, covariance_LEE = stats.mean().numpy(), stats.covariance().numpy()
    topk_count_LE, gate_mass_LE = stats.topk_count.numpy(), stats.gate_mass.numpy()
    return [
        LayerStatistics(
            layer=layer,
            tokens=stats.tokens,
            mean=mean_LE[position],
            covariance=covariance_LEE[position],
            topk_count=topk_count_LE[position],
            gate_mass=gate_mass_LE[position],
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


STAGE = Stage(name="select", version=1, inputs=("collect",), settings=_settings, run=_run)
