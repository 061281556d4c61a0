"""Attention with sinks through PyTorch's flex_attention, compiled on a GPU: scores stay in the kernel.

flex_attention knows nothing of sinks, but gives each query's log-sum-exp. With a sink's score s the softmax's
denominator is exp(lse) + exp(s) instead of exp(lse), so the output is multiplied by sigmoid(lse - s): exactly.

# B sequences, A query heads, K key heads, S positions, C head width
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from nexus_gpt_oss.attention.visibility import Visibility

# Kernels that one process may need: a window or none, documents or none, gradients or none, lengths.
RECOMPILE_LIMIT = 64


def attend(
    query_BASC: torch.Tensor,
    key_BKSC: torch.Tensor,
    value_BKSC: torch.Tensor,
    sinks_A: torch.Tensor,
    visibility: Visibility,
    scaling: float,
) -> torch.Tensor:
    """As `blocks.attend`. On a CPU not compiled, which holds all scores: for tests."""
    output, aux = _compiled(flex_attention, query_BASC.device.type)(
        query_BASC,
        key_BKSC,
        value_BKSC,
        block_mask=_block_mask(visibility, query_BASC),
        scale=scaling,
        enable_gqa=query_BASC.shape[1] != key_BKSC.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    share_BAS = torch.sigmoid(aux.lse - sinks_A.to(aux.lse.dtype).view(1, -1, 1))
    return output * share_BAS.unsqueeze(-1).to(output.dtype)


def _block_mask(visibility: Visibility, query_BASC: torch.Tensor) -> Any:
    """Made once for all layers of a forward pass that share `visibility`."""
    if "block_mask" not in visibility.made:
        documents_BS, window, length = visibility.documents_BS, visibility.window, query_BASC.shape[2]
        batch = None if documents_BS is None else documents_BS.shape[0]

        def sees(b: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = key <= query
            if window is not None:
                seen = seen & (query - key < window)
            if documents_BS is not None:
                seen = seen & (documents_BS[b, query] == documents_BS[b, key])
            return seen

        make = _compiled(create_block_mask, query_BASC.device.type)
        visibility.made["block_mask"] = make(sees, batch, None, length, length, device=query_BASC.device)
    return visibility.made["block_mask"]


@lru_cache(maxsize=4)
def _compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    # Not compiled, the mask is made from a matrix of S x S, and so are the scores.
    if device_type == "cpu":
        return function
    compiled = torch.compile(function)

    def run(*arguments: Any, **keywords: Any) -> Any:
        # Windows, documents, gradients and lengths are kernels of their own; at torch's limit of 8 it would go on
        # without compiling.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(*arguments, **keywords)

    return run
