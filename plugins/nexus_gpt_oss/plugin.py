"""GPT-OSS's answers to NEXUS: the hooks of `nexus_core.hookspecs`, each a few lines; heavy imports stay inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.hookspecs import hookimpl
from nexus_core.types import EmbeddedFile, ExpertLocation, ExpertWeights, MoeBlock, MoeDescription, RunningCosts
from nexus_gpt_oss import checkpoint, costs, harmony

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nexus_core.checkpoint.reader import CheckpointReader

# The version of the hooks that this plugin was written for.
NEXUS_HOOKS = 1

EMBEDDED = Path(__file__).parent / "embedded"
ARCHITECTURE = "NexusGptOssForCausalLM"


@hookimpl
def nexus_claims(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in (checkpoint.BASE_MODEL_TYPE, checkpoint.CONVERTED_MODEL_TYPE)


@hookimpl
def nexus_describe_moe(config: Mapping[str, Any]) -> MoeDescription:
    return checkpoint.describe(config)


@hookimpl
def nexus_enumerate_experts(config: Mapping[str, Any]) -> list[ExpertLocation]:
    return checkpoint.expert_locations(config)


@hookimpl
def nexus_read_expert(reader: CheckpointReader, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
    return checkpoint.read_expert(reader, layer, expert, dtype)


@hookimpl
def nexus_read_expert_rows(
    reader: CheckpointReader, layer: int, expert: int, projection: str, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return checkpoint.read_expert_rows(reader, layer, expert, projection, rows, dtype)


@hookimpl
def nexus_dequantize(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Roles: "blocks" and "scales". Any other set is left to core's default."""
    if set(tensors) != {"blocks", "scales"}:
        return None
    return checkpoint.dense(tensors["blocks"], tensors["scales"], dtype)


@hookimpl
def nexus_stored_bytes(config: Mapping[str, Any]) -> dict[str, int]:
    return checkpoint.stored_bytes(config)


@hookimpl
def nexus_running_costs(config: Mapping[str, Any], device: str) -> RunningCosts:
    return costs.running_costs(config, device)


@hookimpl
def nexus_number_fault(name: str, tensor: torch.Tensor) -> str | None:
    """Of scales; all else is left to core's default."""
    return checkpoint.scale_fault(tensor) if name.endswith("_scales") else None


@hookimpl
def nexus_backends() -> dict[str, str]:
    from nexus_gpt_oss import execution

    return execution.in_use()


@hookimpl
def nexus_load_model(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """Base and converted checkpoints alike; the files are mapped, so memory grows only as experts are used."""
    from nexus_gpt_oss.configuration import NexusGptOssConfig
    from nexus_gpt_oss.modeling import NexusGptOssForCausalLM

    checkpoint.describe(config)
    if config["model_type"] == checkpoint.BASE_MODEL_TYPE:
        config = nexus_converted_config(config, width=0)
    model = NexusGptOssForCausalLM.from_pretrained(
        folder, config=NexusGptOssConfig.from_dict(dict(config)), dtype=dtype
    )
    return model.to(device).eval()


@hookimpl
def nexus_register_auto() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from nexus_gpt_oss.configuration import NexusGptOssConfig
    from nexus_gpt_oss.modeling import NexusGptOssForCausalLM, NexusGptOssModel

    AutoConfig.register(checkpoint.CONVERTED_MODEL_TYPE, NexusGptOssConfig, exist_ok=True)
    AutoModel.register(NexusGptOssConfig, NexusGptOssModel, exist_ok=True)
    AutoModelForCausalLM.register(NexusGptOssConfig, NexusGptOssForCausalLM, exist_ok=True)


@hookimpl
def nexus_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    decoder: Any = getattr(model, "model", model)
    return [MoeBlock(layer, module.mlp, module.mlp.router) for layer, module in enumerate(decoder.layers)]


@hookimpl
def nexus_gate_weights(config: Mapping[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from nexus_gpt_oss.modeling import route

    return route(logits, checkpoint.describe(config).experts_per_token)


@hookimpl
def nexus_neuron_activations(config: Mapping[str, Any], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from nexus_gpt_oss.experts import swiglu

    return swiglu(gate, up, **checkpoint.activation_settings(config))


@hookimpl
def nexus_expert_weights(block: MoeBlock, expert: int, dtype: torch.dtype) -> ExpertWeights:
    experts: Any = block.block.experts
    weights: ExpertWeights = experts.dense(expert, dtype)
    return weights


@hookimpl
def nexus_attach_shared_expert(model: Any, width: int) -> bool:
    model.attach_shared_expert(width)
    return True


@hookimpl
def nexus_attach_router_delta(model: Any) -> bool:
    model.attach_router_delta()
    return True


@hookimpl
def nexus_reply_parts(text: str) -> tuple[str, str]:
    return harmony.reply_parts(text)


@hookimpl
def nexus_shared_expert_tensors(
    config: Mapping[str, Any], layer: int, weights: ExpertWeights
) -> dict[str, torch.Tensor]:
    """Of the checkpoint's own type, bfloat16 as published; an expert without biases gets zeros."""
    import torch

    dtype = getattr(torch, checkpoint.number_type(config))
    tensors = {}
    for projection, weight, bias in (
        ("gate_proj", weights.gate, weights.gate_bias),
        ("up_proj", weights.up, weights.up_bias),
        ("down_proj", weights.down, weights.down_bias),
    ):
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        for part, tensor in (("weight", weight), ("bias", bias)):
            name = checkpoint.shared_expert_tensor(layer, projection, part)
            tensors[name] = tensor.to(dtype).contiguous()
    return tensors


@hookimpl
def nexus_converted_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name != "quantization_config"}
    if "dtype" not in kept and "torch_dtype" not in kept:
        kept["dtype"] = "bfloat16"
    return kept | {
        "model_type": checkpoint.CONVERTED_MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "expert_storage": checkpoint.STORAGE,
        "shared_expert_width": width,
        "has_router_delta": False,
    }


@hookimpl
def nexus_embedded_files() -> list[EmbeddedFile]:
    data = EMBEDDED / "data"
    return [
        EmbeddedFile("tiny-gpt-oss", EMBEDDED / "tiny-gpt-oss", "checkpoint", "a small trained GPT-OSS in MXFP4"),
        EmbeddedFile("prose", data / "prose.jsonl", "data", "held-out documentation in English, one text per line"),
        EmbeddedFile("code", data / "code.jsonl", "data", "held-out Python source, one text per line"),
        EmbeddedFile("arithmetic", data / "arithmetic.jsonl", "data", "held-out word problems with worked answers"),
    ]
