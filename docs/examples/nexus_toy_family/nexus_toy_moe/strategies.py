"""Things a recipe can name, whatever its model: a selection strategy, a merge strategy and a data format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveFloat

from nexus_core import hookimpl
from nexus_core.types import ExpertWeights, MergeRequest, Refusal, Strategy

if TYPE_CHECKING:
    import numpy as np
    import torch

    from nexus_core.data.formats import Passage
    from nexus_core.merge import LayerExperts
    from nexus_core.select import LayerSelection, LayerStatistics, Ranking

NEXUS_HOOKS = 1


class Spread(BaseModel):
    """What a recipe may write beside `strategy: toy_spread`."""

    model_config = ConfigDict(extra="forbid")
    power: PositiveFloat = 1.0


def spread(statistics: LayerStatistics, parameters: Spread, generator: np.random.Generator) -> Ranking:
    """Experts by how much their probability varies from token to token: its standard deviation to a power."""
    from nexus_core.select.ranking import Ranking, normalised

    return Ranking(normalised(statistics.covariance.diagonal() ** (parameters.power / 2)))


@hookimpl
def nexus_selection_strategies() -> list[Strategy]:
    return [Strategy("toy_spread", spread, "by how much an expert's probability varies", parameters=Spread)]


def median(
    experts: LayerExperts, layer: LayerSelection, width: int, parameters: None, generator: torch.Generator
) -> ExpertWeights:
    """Every number the median of the three most important experts' numbers at that place."""
    import torch

    chosen = [experts(expert) for expert in layer.experts[:3]]

    def middle(part: str) -> torch.Tensor:
        return torch.stack([getattr(expert, part).float() for expert in chosen]).median(dim=0).values

    return ExpertWeights(middle("gate"), middle("up"), middle("down"))


def refuse_other_widths(request: MergeRequest, parameters: None) -> Refusal | None:
    """Asked before anything is read, by `nexus check` too."""
    if request.width == request.expert_width:
        return None
    return Refusal("width", f"is {request.width}, but toy_median keeps an expert's width; write {request.expert_width}")


@hookimpl
def nexus_merge_strategies() -> list[Strategy]:
    summary = "the median of the three most important experts"
    return [Strategy("toy_median", median, summary, refuses=refuse_other_widths)]


def dialogue(record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: Any) -> Passage:
    """What was asked and what was told, on two lines; only what was told is learnt."""
    from nexus_core.data.formats import Passage
    from nexus_core.errors import DataError

    asked, told = (record.get(fields.get(role, role)) for role in ("asked", "told"))
    if not isinstance(asked, str) or not isinstance(told, str):
        raise DataError(f"has the fields {', '.join(record)}; format 'toy_dialogue' needs the texts asked and told")
    text = f"{asked}\n{told}"
    return Passage(text, ((len(asked) + 1, len(text)),))


@hookimpl
def nexus_data_formats() -> list[Strategy]:
    return [Strategy("toy_dialogue", dialogue, "two fields: asked and told")]
