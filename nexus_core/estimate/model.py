"""How large a model is: what its family says of it, or what can be told of a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexus_core.types import MoeDescription, RunningCosts

NUMBER_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

# Of a layer of plain transformers code, in numbers per token: what lives at once on the way forward, and what autograd
# keeps, beside the experts' own.
PLAIN_FORWARD_HIDDEN = 10.0
PLAIN_KEPT_HIDDEN = 10.0


@dataclass(frozen=True)
class ModelSize:
    """A model as the estimates see it. stored_bytes: of the checkpoint by part. teacher: what `capture` runs where that
    is another model.
    """

    moe: MoeDescription
    costs: RunningCosts
    stored_bytes: Mapping[str, int]
    teacher: ModelSize | None = None

    @property
    def layers(self) -> int:
        """All decoder layers, those without experts too."""
        return len(self.costs.windows)

    @property
    def expert_numbers(self) -> int:
        """Numbers of one routed expert's matrices."""
        return 3 * self.moe.hidden_size * self.moe.expert_width

    @property
    def cached_numbers(self) -> float:
        """Numbers that a key-value cache keeps of a token in a layer."""
        costs = self.costs
        return 2.0 * costs.heads * costs.head_size if costs.cached_numbers is None else costs.cached_numbers

    @property
    def head_numbers(self) -> int:
        """Numbers of the output head's matrix."""
        return self.moe.vocabulary_size * self.moe.hidden_size

    def shared_numbers(self, width: int | None) -> int:
        """Parameters of NEXUS's shared experts, biases included."""
        return shared_expert_parameters(self.moe, width)


def shared_expert_parameters(description: MoeDescription, width: int | None) -> int:
    """Parameters of one shared expert per layer: gate, up and down, and their biases where the experts have them."""
    hidden, neurons = description.hidden_size, width or description.expert_width
    biases = 2 * neurons + hidden if description.has_expert_biases else 0
    return len(description.layers) * (3 * hidden * neurons + biases)


def plain_costs(config: Mapping[str, Any], moe: MoeDescription, stored_bytes: Mapping[str, int]) -> RunningCosts:
    """The costs of a family that does not say its own, by the config's usual names.

    Experts whose storage is a floating-point type are held in the type computed in; others stay as they are and are
    decoded one at a time. Attention writes no scores down.
    """
    number = NUMBER_BYTES.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), 2)
    is_packed = moe.storage not in NUMBER_BYTES
    routed = stored_bytes.get("routed_experts", 0)
    packed = routed if is_packed else 0
    D, F, K = moe.hidden_size, moe.expert_width, moe.experts_per_token
    layers = int(config.get("num_hidden_layers") or len(moe.layers))
    heads = int(config.get("num_attention_heads") or 1)
    expert = 3 * D * F
    in_layers = sum(size for part, size in stored_bytes.items() if part not in ("routed_experts", "embeddings"))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    return RunningCosts(
        packed_bytes=packed,
        held_numbers=(sum(stored_bytes.values()) - packed) // number,
        layer_products=in_layers // number,
        decoded_numbers=len(moe.layers) * moe.experts * expert if is_packed else 0,
        buffer_numbers=expert if is_packed else 0,
        heads=heads,
        head_size=int(config.get("head_dim") or D // heads),
        windows=tuple(window if window and kind == "sliding_attention" else None for kind in kinds),
        score_numbers=0.0,
        kept_score_numbers=0.0,
        forward_numbers=PLAIN_FORWARD_HIDDEN * D + 2 * K * (2 * F + D),
        backward_numbers=PLAIN_FORWARD_HIDDEN * D + 2 * K * (2 * F + D),
        kept_numbers=PLAIN_KEPT_HIDDEN * D + K * (4 * F + 2 * D),
        cached_numbers=2 * int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or D // heads),
    )
