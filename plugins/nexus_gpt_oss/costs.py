"""What holding and running GPT-OSS takes, counted from its config: the answer to `nexus_running_costs`.

The counts per token follow the code that runs (transformers' layer around `PackedMixture`), and a test compares them
with what autograd keeps.

    # D hidden size, F expert width, K experts per token, E experts, L layers
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nexus_core.types import RunningCosts
from nexus_gpt_oss.attention import LONGER_THAN
from nexus_gpt_oss.checkpoint import (
    BYTES_PER_NUMBER,
    DEFAULT_HEAD_DIM,
    GROUP,
    describe,
    number_type,
    stored_bytes,
)

DEFAULT_WINDOW = 128

# What `backends` names and a test compares: bytes that `grouped` decodes into unless NEXUS_GPT_OSS_DECODED_MB says
# otherwise, rows between the two products at a time, and rows of an activation at a time.
BUFFER_BYTES = 256 << 20
SLICE_ROWS = 8192
PIECE_ROWS = 2048

# Scores at once on the way forward, for a pair of tokens and a head: those that were masked, those beside sinks, and
# what is made of these. The softmax is kept.
SCORES_AT_WORK = 3.0
SCORES_KEPT = 1.0

# The router spreads rows unevenly: about so many times the mean for the expert that has most.
MOST_ROWS = 3.0

# Numbers at once for each neuron of an expert and each row of a piece, beside what goes into its activation and comes
# out of it.
NEURONS_FORWARD = 7.0
NEURONS_BACKWARD = 9.0


def running_costs(config: Mapping[str, Any], device: str) -> RunningCosts:
    """On a CPU one expert at a time, on a GPU ("cuda") all rows at once with experts decoded into a bounded buffer.

    Raises CheckpointError as `describe` does.
    """
    moe, stored = describe(config), stored_bytes(config)
    number = BYTES_PER_NUMBER[number_type(config)]
    D, F, K, E, L = moe.hidden_size, moe.expert_width, moe.experts_per_token, moe.experts, len(moe.layers)
    expert = 3 * D * F
    packed = L * E * expert * (GROUP // 2 + 1) // GROUP
    heads, kv_heads = (int(config[name]) for name in ("num_attention_heads", "num_key_value_heads"))
    head_size = int(config.get("head_dim") or DEFAULT_HEAD_DIM)
    window = int(config.get("sliding_window") or DEFAULT_WINDOW)
    kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * L
    is_grouped = device == "cuda"
    # Embeddings, the layer's input, what is normed; queries, and keys and values, each once for every head.
    attention = 3 * D + (4 * heads + 2 * kv_heads) * head_size
    # By head queries, keys and values; or, where scores are never held, keys and values as they are, and the output.
    attention_kept = (2 * heads + 2 * kv_heads if is_grouped else 3 * heads) * head_size
    rows, sliced_forward, sliced_backward = (_sorted if is_grouped else _in_turn)(D, F, K, E)
    return RunningCosts(
        packed_bytes=packed,
        held_numbers=(sum(stored.values()) - packed) // number,
        layer_products=L * (D * (heads + 2 * kv_heads) * head_size + heads * head_size * D + D * E),
        decoded_numbers=L * E * expert,
        buffer_numbers=min(BUFFER_BYTES // BYTES_PER_NUMBER["bfloat16"], E * 2 * D * F) if is_grouped else 2 * D * F,
        heads=heads,
        head_size=head_size,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds[:L]),
        # Two masks for all heads.
        score_numbers=SCORES_AT_WORK + 2 / heads,
        kept_score_numbers=SCORES_KEPT,
        forward_numbers=max(attention, 5 * D + rows * D),
        backward_numbers=max(attention, 5 * D + rows * D),
        # What goes into the shared expert, attention's, what goes into the experts' activation, and, where the gate
        # weights' gradients are taken from it, what comes out of them. Of the norms, their inputs in float32.
        kept_numbers=D + attention_kept + K * (2 * F + (0 if is_grouped else D)) + 2 * E,
        kept_bytes=2 * D * BYTES_PER_NUMBER["float32"],
        shared_numbers=7.0,
        score_tokens=LONGER_THAN[device],
        cached_numbers=2 * kv_heads * head_size,
        sliced_forward=sliced_forward,
        sliced_backward=sliced_backward,
    )


# Numbers of whole rows for each token, as many as D; and by slices of tokens, forward and back.
Rows = tuple[float, tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]


def _sorted(D: int, F: int, K: int, E: int) -> Rows:
    """All rows sorted by expert, in slices: forward gate_up, what it is made of and, in the group that is decoded, a
    product and its bias; back the gradient of gate_up and, of a group, what becomes of it. The activation's pieces come
    when no decoded buffer is there, and are smaller.
    """
    tokens = SLICE_ROWS / K
    return float(K), ((tokens, K * (D + 3.0 * F)),), ((tokens, K * (D + 1.5 * F)),)


def _in_turn(D: int, F: int, K: int, E: int) -> Rows:
    """One expert after the other."""
    rows = MOST_ROWS * K / E
    # Of the expert that has most rows, whatever their number: gate_up, or its gradient, and the activation's.
    whole = (math.inf, rows * 3.0 * F)
    piece = PIECE_ROWS / rows
    return rows, (whole, (piece, rows * NEURONS_FORWARD * F)), (whole, (piece, rows * NEURONS_BACKWARD * F))
