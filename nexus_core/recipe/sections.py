"""What every part of a recipe is made of: sections with exact types, and the plain numbers and names in them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Weight = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, types are exact, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StrategySection(Section):
    """A part that chooses a strategy: keys beside the ones below are that strategy's parameters."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """The chosen strategy's own parameters, defaults filled in once the recipe has been loaded."""
        return dict(self.__pydantic_extra__ or {})
