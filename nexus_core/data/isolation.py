"""Whether a model keeps packed documents apart when it is told each token's place in its own document.

# S tokens
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

# Of what a document's outputs change by when other text stands before it, this much at most may remain of it.
LARGEST_REST = 0.1

_TOKENS = 6

log = logging.getLogger(__name__)


def position_arguments(isolates: bool, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model's forward pass takes so that documents don't see each other; nothing for a model that can't."""
    return {"position_ids": positions} if isolates else {}


@torch.no_grad()
def isolates_documents(model: Any) -> bool:
    """Whether `position_ids` that begin again with every document keep the model's attention inside of each.

    Tried, not looked up: some models of transformers number the tokens anew and still let them see the documents
    before, which is worse than doing nothing. The same document is read behind two others; its outputs must not tell
    which. Costs four passes of a dozen tokens.
    """
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    size = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(3 * _TOKENS, device=device) % size
    one, other, document = tokens.split(_TOKENS)
    positions_S = torch.arange(_TOKENS, device=device).repeat(2)

    def outputs(before: torch.Tensor, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        read = model.base_model(input_ids=torch.cat([before, document])[None], use_cache=False, **arguments)
        return read.last_hidden_state[0, _TOKENS:].float()

    def change(arguments: dict[str, torch.Tensor]) -> float:
        return float((outputs(one, arguments) - outputs(other, arguments)).norm())

    is_apart = change({"position_ids": positions_S[None]}) <= LARGEST_REST * change({})
    if not is_apart:
        log.info("this model cannot keep packed documents apart; a document sees those before it in its sequence")
    return is_apart
