"""What holding and running GPT-OSS takes, counted from its config: the answer to `nexus_running_costs`.

The counts per token follow the code that runs (transformers' layer around `PackedMixture`), and a test compares them
with what autograd keeps.

    # D hidden size, F expert width, K experts per token, E experts, L layers
"""

from __future__ import annotations

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

# What `backends.grouped` decodes into unless NEXUS_GPT_OSS_DECODED_MB says otherwise.
BUFFER_BYTES = 1024 << 20

# Scores at once on the way forward, for a pair of tokens and a head: those that were masked, those beside sinks, and
# what is made of these. The softmax is kept.
SCORES_AT_WORK = 3.0
SCORES_KEPT = 1.0

# Numbers at once for each of an expert's neurons and each row, where all rows are computed together.
NEURONS_FORWARD = 9.0
NEURONS_BACKWARD = 12.0


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
    # The router spreads rows unevenly: about three times the mean for the expert that has most.
    rows = K if is_grouped else 3 * K / E
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
        forward_numbers=max(attention, 5 * D + rows * (D + NEURONS_FORWARD * F)),
        backward_numbers=max(attention, 5 * D + rows * (D + NEURONS_BACKWARD * F)),
        # What goes into the shared expert, attention's, and what goes into the experts' activation and comes out of
        # them. Of the norms, their inputs in float32.
        kept_numbers=D + attention_kept + K * (2 * F + D) + 2 * E,
        kept_bytes=2 * D * BYTES_PER_NUMBER["float32"],
        shared_numbers=7.0,
        score_tokens=LONGER_THAN[device],
    )
