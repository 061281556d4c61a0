"""The layout of a GPT-OSS checkpoint: names, sizes and bytes from its config alone, and one expert by its slices.

# L layers, E experts, D hidden size, F expert width, G groups of 32 numbers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nexus_core.errors import CheckpointError
from nexus_core.types import ExpertLocation, ExpertWeights, MoeDescription, TensorPart

if TYPE_CHECKING:
    import torch

    from nexus_core.checkpoint.reader import CheckpointReader

FAMILY = "gpt_oss"
BASE_MODEL_TYPE = "gpt_oss"
CONVERTED_MODEL_TYPE = "nexus_gpt_oss"
STORAGE = "mxfp4"
GROUP = 32

# What a config leaves out has these values, as in transformers; the published ones leave out the activation's alpha.
DEFAULT_HEAD_DIM = 64
DEFAULT_SWIGLU_ALPHA = 1.702
DEFAULT_SWIGLU_LIMIT = 7.0
BYTES_PER_NUMBER = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ROUTER_DELTA_BYTES = 4
NAN_SCALE = 255

EXPERT_TENSORS = (
    "gate_up_proj_blocks",
    "gate_up_proj_scales",
    "gate_up_proj_bias",
    "down_proj_blocks",
    "down_proj_scales",
    "down_proj_bias",
)


def expert_tensor(layer: int, name: str) -> str:
    """The name on disk of one of EXPERT_TENSORS; its first dimension is the expert."""
    return f"model.layers.{layer}.mlp.experts.{name}"


def shared_expert_tensor(layer: int, projection: str, part: str) -> str:
    """The name on disk of a shared expert's projection (gate_proj, up_proj, down_proj), part weight or bias."""
    return f"model.layers.{layer}.mlp.shared_expert.{projection}.{part}"


def refuse_unless_packed(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the config says that the experts lie there as MXFP4."""
    model_type = config.get("model_type")
    if model_type == CONVERTED_MODEL_TYPE:
        field, storage = "expert_storage", config.get("expert_storage")
    else:
        field, storage = "quant_method", (config.get("quantization_config") or {}).get("quant_method")
    if storage != STORAGE:
        raise CheckpointError(
            f"config.json: model_type '{model_type}' with {field} {storage!r}, not '{STORAGE}': the experts of this "
            "checkpoint are not in GPT-OSS's packed 4-bit form, the only one NEXUS reads; use the checkpoint as it was "
            "published, such as openai/gpt-oss-20b"
        )


def describe(config: Mapping[str, Any]) -> MoeDescription:
    """Raises CheckpointError if the experts are not MXFP4, a size is missing, or is no multiple of 32."""
    refuse_unless_packed(config)
    sizes = {name: _size(config, name) for name in ("hidden_size", "intermediate_size")}
    for name, size in sizes.items():
        if size % GROUP:
            raise CheckpointError(f"config.json: {name} {size} is not a multiple of {GROUP}, MXFP4's group size")
    return MoeDescription(
        family=FAMILY,
        model_type=str(config["model_type"]),
        layers=tuple(range(_size(config, "num_hidden_layers"))),
        experts=_size(config, "num_local_experts"),
        experts_per_token=_size(config, "num_experts_per_tok"),
        hidden_size=sizes["hidden_size"],
        expert_width=sizes["intermediate_size"],
        vocabulary_size=_size(config, "vocab_size"),
        storage=STORAGE,
        weights_sum_to_one=True,
        has_expert_biases=True,
        shared_expert_width=int(config.get("shared_expert_width") or 0),
    )


def stored_bytes(config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by part; together exactly the tensors of the checkpoint. Norms count with what they precede."""
    moe = describe(config)
    D, F, E, L = moe.hidden_size, moe.expert_width, moe.experts, len(moe.layers)
    head_dim = int(config.get("head_dim") or DEFAULT_HEAD_DIM)
    query_heads, kv_heads = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    number = BYTES_PER_NUMBER[number_type(config)]

    def linear(inputs: int, outputs: int, has_bias: bool = True) -> int:
        return outputs * (inputs + has_bias)

    def packed(inputs: int, outputs: int) -> int:
        return outputs * (inputs // 2 + inputs // GROUP)

    has_bias = bool(config.get("attention_bias", True))
    projections = linear(D, (query_heads + 2 * kv_heads) * head_dim, has_bias) + linear(
        query_heads * head_dim, D, has_bias
    )
    width = moe.shared_expert_width
    shared = 2 * linear(D, width) + linear(width, D) if width else 0
    # Weight and bias of the logits' change, and the selection bias.
    router_delta = (linear(D, E) + E) * ROUTER_DELTA_BYTES if config.get("has_router_delta") else 0
    head = 0 if config.get("tie_word_embeddings") else D * moe.vocabulary_size
    return {
        "routed_experts": L * E * (packed(D, 2 * F) + packed(F, D) + (2 * F + D) * number),
        "router": L * ((linear(D, E) + D) * number + router_delta),
        "attention": L * (projections + query_heads + D) * number,
        "embeddings": (D * moe.vocabulary_size + head + D) * number,
        "shared_experts": L * shared * number,
    }


def activation_settings(config: Mapping[str, Any]) -> dict[str, float]:
    """alpha and limit of the experts' activation."""
    return {
        "alpha": float(config.get("swiglu_alpha", DEFAULT_SWIGLU_ALPHA)),
        "limit": float(config.get("swiglu_limit", DEFAULT_SWIGLU_LIMIT)),
    }


def expert_locations(config: Mapping[str, Any]) -> list[ExpertLocation]:
    """Where each routed expert lies, by layer, then expert."""
    moe = describe(config)
    return [
        ExpertLocation(layer, expert, tuple(TensorPart(expert_tensor(layer, name), expert) for name in EXPERT_TENSORS))
        for layer in moe.layers
        for expert in range(moe.experts)
    ]


def read_expert(reader: CheckpointReader, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
    """One expert, dense, in canonical layout. Raises CheckpointError if there is no such tensor or expert."""
    blocks, scales, bias, down_blocks, down_scales, down_bias = (
        reader.read(expert_tensor(layer, name), expert) for name in EXPERT_TENSORS
    )
    # Rows alternate gate, up; they are taken apart while still packed, which moves a quarter of the bytes.
    return ExpertWeights(
        gate=dense(blocks[0::2], scales[0::2], dtype),
        up=dense(blocks[1::2], scales[1::2], dtype),
        down=dense(down_blocks, down_scales, dtype),
        gate_bias=bias[0::2].to(dtype, copy=True),
        up_bias=bias[1::2].to(dtype, copy=True),
        down_bias=down_bias.to(dtype),
    )


def read_expert_rows(
    reader: CheckpointReader, layer: int, expert: int, projection: str, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of an expert's "gate", "up" or "down", dense, and of its bias; only their bytes are read."""
    if projection == "down":
        names, stored, step = EXPERT_TENSORS[3:], rows, slice(None)
    else:
        names, stored = EXPERT_TENSORS[:3], slice(2 * rows.start, 2 * rows.stop)
        step = slice(0 if projection == "gate" else 1, None, 2)
    blocks, scales, bias = (reader.read(expert_tensor(layer, name), expert, stored)[step] for name in names)
    return dense(blocks, scales, dtype), bias.to(dtype, copy=True)


def dense(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """MXFP4 (..., G, 16) and (..., G) as numbers (..., 32 G) of any floating type, rounded once."""
    import torch

    from nexus_gpt_oss.mxfp4 import PAIR_TYPES, decode

    return decode(blocks, scales, dtype if dtype in PAIR_TYPES else torch.float32).to(dtype)


def scale_fault(scales: torch.Tensor) -> str:
    """What is wrong with MXFP4 scales: 255 stands for NaN."""
    faults = (scales == NAN_SCALE).nonzero()
    return f"has at {faults[0].tolist()} the scale {NAN_SCALE}, which stands for NaN" if len(faults) else ""


def number_type(config: Mapping[str, Any]) -> str:
    """The type of everything that is not packed, e.g. "bfloat16", as published checkpoints have it.

    Raises CheckpointError if the config names a type that no checkpoint of this family has.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if name not in BYTES_PER_NUMBER:
        raise CheckpointError(f"config.json: dtype '{name}' is not one of {', '.join(BYTES_PER_NUMBER)}")
    return name


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "is missing" if value is None else f"is {value!r}, not a positive number"
        raise CheckpointError(f"config.json: {name} {found}, so the model's size is unknown")
    return value
