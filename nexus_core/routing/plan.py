"""What a routing strategy answers: what of the routers learns by gradient, and what by a rule.

# E experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# From the choices (E,) that each expert of a layer got in a step to the change of its selection bias (E,).
SelectionStep = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RouterPlan:
    """lr_multipliers: of the router parameters that learn by gradient, by name; those left out do not.

    selection_step: called for each layer after every optimizer step, as long as router biases may learn; what it
    returns is added to the layer's selection bias. None leaves selection to the logits.
    """

    lr_multipliers: Mapping[str, float]
    selection_step: SelectionStep | None = None

    @classmethod
    def of(cls, answer: RouterPlan | Mapping[str, float]) -> RouterPlan:
        """A plan from what a strategy's function returned; a plain mapping has no rule."""
        return answer if isinstance(answer, RouterPlan) else cls(dict(answer))
