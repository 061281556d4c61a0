"""my_moe's answers to NEXUS's hooks. What each must give, and who asks: docs/hooks.md of NEXUS.

torch and transformers are imported inside the functions: this module is imported by every `nexus` command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core import hookimpl
from nexus_core.errors import CheckpointError
from nexus_core.types import ExpertLocation, ExpertWeights, MoeBlock, MoeDescription, TensorPart

if TYPE_CHECKING:
    import torch

    from nexus_core.checkpoint.reader import CheckpointReader
    from nexus_my_moe.modeling import NexusMyMoeForCausalLM

# The version of the hooks this plugin was written for.
NEXUS_HOOKS = 1

BASE = "my_moe"
CONVERTED = "nexus_my_moe"


def size(config: Mapping[str, Any], name: str) -> int:
    """Guessed sizes fail late, so a missing one is an error at once."""
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {name} is {value!r}, not a positive number; the model's size is unknown")
    return value


def expert_tensors(layer: int, expert: int) -> list[str]:
    """ADAPT: the names on disk of one expert's gate (F, D), up (F, D) and down (D, F)."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return [f"{prefix}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]


# Which checkpoint, and what is in it


@hookimpl
def nexus_claims(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in (BASE, CONVERTED)


@hookimpl
def nexus_describe_moe(config: Mapping[str, Any]) -> MoeDescription:
    """ADAPT: what config.json calls its sizes, and which layers have experts."""
    return MoeDescription(
        family=BASE,
        model_type=str(config["model_type"]),
        layers=tuple(range(size(config, "num_hidden_layers"))),
        experts=size(config, "num_experts"),
        experts_per_token=size(config, "num_experts_per_tok"),
        hidden_size=size(config, "hidden_size"),
        expert_width=size(config, "moe_intermediate_size"),
        vocabulary_size=size(config, "vocab_size"),
        storage=str(config.get("dtype", "bfloat16")),
        weights_sum_to_one=True,
        has_expert_biases=False,
        shared_expert_width=int(config.get("shared_expert_width", 0)),
    )


@hookimpl
def nexus_enumerate_experts(config: Mapping[str, Any]) -> list[ExpertLocation]:
    """Experts that lie together in one tensor are `TensorPart(name, index=expert)` instead."""
    moe = nexus_describe_moe(config)
    return [
        ExpertLocation(layer, expert, tuple(TensorPart(name) for name in expert_tensors(layer, expert)))
        for layer in moe.layers
        for expert in range(moe.experts)
    ]


@hookimpl
def nexus_read_expert(reader: CheckpointReader, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
    gate, up, down = (reader.read(name).to(dtype) for name in expert_tensors(layer, expert))
    return ExpertWeights(gate, up, down)


@hookimpl
def nexus_stored_bytes(config: Mapping[str, Any]) -> dict[str, int]:
    """Counted on an empty model, so that the numbers are exact for any size.

    ADAPT: a head that is tied to the embeddings lies on disk once; skip its name.
    """
    import torch

    from nexus_my_moe.modeling import NexusMyMoeConfig, NexusMyMoeForCausalLM

    with torch.device("meta"):
        model = NexusMyMoeForCausalLM(NexusMyMoeConfig.from_dict(nexus_converted_config(config, width=shared(config))))
    number = getattr(torch, nexus_describe_moe(config).storage).itemsize
    parts = Counter(routed_experts=0, router=0, attention=0, embeddings=0, shared_experts=0)
    for name, tensor in model.state_dict().items():
        parts[part_of(name)] += tensor.numel() * (4 if "router_delta" in name else number)
    return dict(parts)


def shared(config: Mapping[str, Any]) -> int:
    return int(config.get("shared_expert_width", 0))


def part_of(name: str) -> str:
    """ADAPT: which part of the model a tensor of this name belongs to."""
    for piece, part in (
        (".shared_expert.", "shared_experts"),
        (".experts.", "routed_experts"),
        (".mlp.gate.", "router"),
        (".layers.", "attention"),
    ):
        if piece in name:
            return part
    return "embeddings"


@hookimpl
def nexus_load_model(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> Any:
    """Base and converted checkpoints as the same class, so that additions can be attached to either."""
    from nexus_my_moe.modeling import NexusMyMoeConfig, NexusMyMoeForCausalLM

    if config["model_type"] == BASE:
        config = nexus_converted_config(config, width=0)
    settings = NexusMyMoeConfig.from_dict(dict(config))
    return NexusMyMoeForCausalLM.from_pretrained(folder, config=settings, dtype=dtype).to(device).eval()


@hookimpl
def nexus_register_auto() -> None:
    """With this, AutoModelForCausalLM.from_pretrained knows converted checkpoints after `import nexus_core.auto`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nexus_my_moe.modeling import NexusMyMoeConfig, NexusMyMoeForCausalLM

    AutoConfig.register(CONVERTED, NexusMyMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(NexusMyMoeConfig, NexusMyMoeForCausalLM, exist_ok=True)


# The running model


@hookimpl
def nexus_moe_blocks(model: NexusMyMoeForCausalLM) -> list[MoeBlock]:
    return model.moe_blocks()


# nexus_router_logits is not here: the router's forward returns (logits, weights, indices), which core understands.


@hookimpl
def nexus_gate_weights(config: Mapping[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from nexus_my_moe.base import route

    return route(logits, size(config, "num_experts_per_tok"))


@hookimpl
def nexus_neuron_activations(config: Mapping[str, Any], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """ADAPT: the same as `activation` in modeling.py, from the config alone."""
    from transformers.activations import ACT2FN

    return ACT2FN[config.get("hidden_act", "silu")](gate) * up


@hookimpl
def nexus_expert_weights(block: MoeBlock, expert: int, dtype: torch.dtype) -> ExpertWeights:
    """ADAPT: as `nexus_read_expert`, of the running model."""
    own: Any = block.block.experts[expert]
    gate, up, down = (linear.weight.detach().to(dtype) for linear in (own.gate_proj, own.up_proj, own.down_proj))
    return ExpertWeights(gate, up, down)


@hookimpl
def nexus_attach_shared_expert(model: NexusMyMoeForCausalLM, width: int) -> bool:
    model.attach_shared_expert(width)
    return True


@hookimpl
def nexus_attach_router_delta(model: NexusMyMoeForCausalLM) -> bool:
    model.attach_router_delta()
    return True


# Converted checkpoints


@hookimpl
def nexus_shared_expert_tensors(
    config: Mapping[str, Any], layer: int, weights: ExpertWeights
) -> dict[str, torch.Tensor]:
    """ADAPT: the names that `modeling.py`'s shared expert has in the model's state dict."""
    import torch

    dtype = getattr(torch, nexus_describe_moe(config).storage)
    prefix = f"model.layers.{layer}.mlp.shared_expert"
    projections = {"gate_proj": weights.gate, "up_proj": weights.up, "down_proj": weights.down}
    return {f"{prefix}.{name}.weight": tensor.to(dtype).contiguous() for name, tensor in projections.items()}


@hookimpl
def nexus_converted_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    return {
        **config,
        "model_type": CONVERTED,
        "architectures": ["NexusMyMoeForCausalLM"],
        "shared_expert_width": width,
        "has_router_delta": bool(config.get("has_router_delta", False)),
    }
