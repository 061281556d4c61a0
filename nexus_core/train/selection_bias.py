"""Moves the routers' selection biases by a rule, from how often each expert was chosen in a step.

# L layers, E experts, T tokens, K experts per token
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.processes import sum_in_place
from nexus_core.routing.plan import SelectionStep
from nexus_core.statistics.listening import Listener
from nexus_core.train.engines.engine import Engine

PROBE_TOKENS = 8

# More than any router's logits or scores differ by.
DECISIVE = 1e4


class SelectionBiases:
    """The selection biases (E,) of all layers, and the choices counted since they last moved.

    To be made while the model is whole. device: where it will compute.
    """

    def __init__(self, biases: Sequence[nn.Parameter], step: SelectionStep, device: torch.device):
        self._biases, self._step = list(biases), step
        self._choices = [torch.zeros_like(bias, dtype=torch.int64, device=device) for bias in self._biases]

    @torch.no_grad()
    def refuse_if_ignored(self, engine: Engine, listener: Listener) -> None:
        """Raises TrainingError if experts are not chosen by these biases: the family's routers do not know them."""
        model = engine.model
        input_ids = torch.arange(PROBE_TOKENS, device=self._choices[0].device)[None] % model.config.vocab_size
        with engine.writing(self._biases):
            before = [bias.clone() for bias in self._biases]
            for bias in self._biases:
                bias[-1] = DECISIVE
        model.base_model(input_ids=input_ids, use_cache=False)
        with engine.writing(self._biases):
            for bias, old in zip(self._biases, before, strict=True):
                bias.copy_(old)
        for choices_E, layer in zip(self._choices, sorted(listener.routers), strict=True):
            if not bool((listener.routers[layer].indices == len(choices_E) - 1).any(dim=-1).all()):
                raise TrainingError(
                    f"the router of layer {layer} does not choose experts by the selection bias, so this family cannot "
                    "be trained with train.routing.strategy balance or sparsify; take frozen, bias or trainable"
                )

    def count(self, listener: Listener, text: torch.Tensor) -> None:
        """Add the choices of the last forward pass at the places `text` (T,) of its tokens: padding has no say."""
        for choices_E, layer in zip(self._choices, sorted(listener.routers), strict=True):
            indices_TK = listener.routers[layer].indices.flatten(0, -2)[text]
            choices_E += torch.bincount(indices_TK.flatten(), minlength=len(choices_E))

    @torch.no_grad()
    def move(self, engine: Engine, *, learns: bool) -> None:
        """Apply the rule to every layer, if router biases may still learn, and begin to count anew.

        What counts are the choices of all processes.
        """
        if learns:
            with engine.writing(self._biases):
                for bias, choices_E in zip(self._biases, self._choices, strict=True):
                    bias.add_(self._step(sum_in_place(choices_E)).to(bias))
        for choices_E in self._choices:
            choices_E.zero_()
