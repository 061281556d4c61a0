"""toy_moe's answers to NEXUS's hooks. What each must give, and who asks: docs/hooks.md of NEXUS.

torch and transformers are imported inside the functions: this module is imported by every `nexus` command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core import hookimpl
from nexus_core.errors import CheckpointError
from nexus_core.types import ExpertLocation, ExpertWeights, MoeBlock, MoeDescription, RouterOutput, TensorPart

if TYPE_CHECKING:
    import torch

    from nexus_core.checkpoint.reader import CheckpointReader
    from nexus_toy_moe.modeling import NexusToyMoeForCausalLM

# The version of the hooks this plugin was written for.
NEXUS_HOOKS = 1

BASE = "toy_moe"
CONVERTED = "nexus_toy_moe"


def size(config: Mapping[str, Any], name: str) -> int:
    """Guessed sizes fail late, so a missing one is an error at once."""
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {name} is {value!r}, not a positive number; the model's size is unknown")
    return value


def expert_tensors(layer: int) -> list[str]:
    """The names on disk of a layer's gates (E, F, D), ups (E, F, D) and downs (E, D, F), all experts in each."""
    return [f"toy.blocks.{layer}.feed.{name}" for name in ("gates", "ups", "downs")]


# Which checkpoint, and what is in it


@hookimpl
def nexus_claims(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in (BASE, CONVERTED)


@hookimpl
def nexus_describe_moe(config: Mapping[str, Any]) -> MoeDescription:
    return MoeDescription(
        family=BASE,
        model_type=str(config["model_type"]),
        layers=tuple(range(int(config["dense_layers"]), size(config, "num_hidden_layers"))),
        experts=size(config, "specialists"),
        experts_per_token=size(config, "specialists_per_token"),
        hidden_size=size(config, "hidden_size"),
        expert_width=size(config, "specialist_width"),
        vocabulary_size=size(config, "vocab_size"),
        storage=str(config.get("dtype", "bfloat16")),
        weights_sum_to_one=False,
        has_expert_biases=False,
        shared_expert_width=int(config.get("shared_expert_width", 0)),
    )


@hookimpl
def nexus_enumerate_experts(config: Mapping[str, Any]) -> list[ExpertLocation]:
    moe = nexus_describe_moe(config)
    return [
        ExpertLocation(layer, expert, tuple(TensorPart(name, expert) for name in expert_tensors(layer)))
        for layer in moe.layers
        for expert in range(moe.experts)
    ]


@hookimpl
def nexus_read_expert(reader: CheckpointReader, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
    gate, up, down = (reader.read(name, expert).to(dtype) for name in expert_tensors(layer))
    return ExpertWeights(gate, up, down)


@hookimpl
def nexus_stored_bytes(config: Mapping[str, Any]) -> dict[str, int]:
    """Counted on an empty model, so that the numbers are exact for any size."""
    import torch

    from nexus_toy_moe.modeling import NexusToyMoeConfig, NexusToyMoeForCausalLM

    with torch.device("meta"):
        model = NexusToyMoeForCausalLM(
            NexusToyMoeConfig.from_dict(nexus_converted_config(config, width=shared(config)))
        )
    number = getattr(torch, nexus_describe_moe(config).storage).itemsize
    parts = Counter(routed_experts=0, router=0, attention=0, embeddings=0, shared_experts=0)
    for name, tensor in model.state_dict().items():
        parts[part_of(name)] += tensor.numel() * (4 if "router_delta" in name else number)
    return dict(parts)


def shared(config: Mapping[str, Any]) -> int:
    return int(config.get("shared_expert_width", 0))


def part_of(name: str) -> str:
    """Which part of the model a tensor of this name belongs to."""
    for piece, part in (
        (".shared_expert.", "shared_experts"),
        (".feed.gates", "routed_experts"),
        (".feed.ups", "routed_experts"),
        (".feed.downs", "routed_experts"),
        (".feed.switch.", "router"),
        (".feed.", "dense_layers"),
        (".blocks.", "attention"),
    ):
        if piece in name:
            return part
    return "embeddings"


@hookimpl
def nexus_load_model(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> Any:
    """Base and converted checkpoints as the same class, so that additions can be attached to either."""
    from nexus_toy_moe.modeling import NexusToyMoeConfig, NexusToyMoeForCausalLM

    if config["model_type"] == BASE:
        config = nexus_converted_config(config, width=0)
    settings = NexusToyMoeConfig.from_dict(dict(config))
    return NexusToyMoeForCausalLM.from_pretrained(folder, config=settings, dtype=dtype).to(device).eval()


@hookimpl
def nexus_register_auto() -> None:
    """With this, AutoModelForCausalLM.from_pretrained knows converted checkpoints after `import nexus_core.auto`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nexus_toy_moe.modeling import NexusToyMoeConfig, NexusToyMoeForCausalLM

    AutoConfig.register(CONVERTED, NexusToyMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(NexusToyMoeConfig, NexusToyMoeForCausalLM, exist_ok=True)


# The running model


@hookimpl
def nexus_moe_blocks(model: NexusToyMoeForCausalLM) -> list[MoeBlock]:
    return model.moe_blocks()


@hookimpl
def nexus_router_logits(output: Any) -> RouterOutput:
    weights, indices, logits = output
    return RouterOutput(logits, weights, indices)


@hookimpl
def nexus_gate_weights(config: Mapping[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from nexus_toy_moe.base import route

    return route(logits, size(config, "specialists_per_token"))


@hookimpl
def nexus_neuron_activations(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from nexus_toy_moe.base import gelu_gate

    return gelu_gate(gate, up)


@hookimpl
def nexus_expert_weights(block: MoeBlock, expert: int, dtype: torch.dtype) -> ExpertWeights:
    """As `nexus_read_expert`, of the running model."""
    own: Any = block.block
    gate, up, down = (stacked[expert].detach().to(dtype) for stacked in (own.gates, own.ups, own.downs))
    return ExpertWeights(gate, up, down)


@hookimpl
def nexus_attach_shared_expert(model: NexusToyMoeForCausalLM, width: int) -> bool:
    model.attach_shared_expert(width)
    return True


@hookimpl
def nexus_attach_router_delta(model: NexusToyMoeForCausalLM) -> bool:
    model.attach_router_delta()
    return True


# Converted checkpoints


@hookimpl
def nexus_shared_expert_tensors(
    config: Mapping[str, Any], layer: int, weights: ExpertWeights
) -> dict[str, torch.Tensor]:
    """Called as `modeling.py` calls them."""
    import torch

    dtype = getattr(torch, nexus_describe_moe(config).storage)
    prefix = f"toy.blocks.{layer}.feed.shared_expert"
    projections = {"gate_proj": weights.gate, "up_proj": weights.up, "down_proj": weights.down}
    return {f"{prefix}.{name}.weight": tensor.to(dtype).contiguous() for name, tensor in projections.items()}


@hookimpl
def nexus_converted_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    return {
        **config,
        "model_type": CONVERTED,
        "architectures": ["NexusToyMoeForCausalLM"],
        "shared_expert_width": width,
        "has_router_delta": bool(config.get("has_router_delta", False)),
    }
