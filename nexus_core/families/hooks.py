"""A plugin made of layouts: every family hook, answered from one table row per family. Heavy imports stay inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.errors import UsageError
from nexus_core.families.layout import PROJECTIONS, Layout, Projection, number_type
from nexus_core.families.rules import Config
from nexus_core.hookspecs import HOOKS_VERSION, hookimpl
from nexus_core.types import ExpertLocation, ExpertWeights, MoeBlock, MoeDescription, TensorPart

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nexus_core.checkpoint.reader import CheckpointReader
    from nexus_core.families.extended import ExtendedModel


class TransformersFamilies:
    """A plugin for the families of the given layouts; a family that does one thing in its own way overrides that hook.

    An overriding method carries `@hookimpl` again.
    """

    NEXUS_HOOKS = HOOKS_VERSION

    def __init__(self, *layouts: Layout):
        self.layouts = layouts
        self._by_type = {name: row for row in layouts for name in (row.model_type, row.converted_model_type)}

    def layout(self, config: Config) -> Layout:
        """The layout of a checkpoint with this config."""
        return self._by_type[config["model_type"]]

    def own_config(self, config: Config) -> dict[str, Any]:
        """The config of the family's extended model; a base gets one of no shared expert."""
        is_base = config["model_type"] == self.layout(config).model_type
        return self.nexus_converted_config(config, width=0) if is_base else dict(config)

    @hookimpl
    def nexus_claims(self, config: Config) -> bool:
        return config.get("model_type") in self._by_type

    @hookimpl
    def nexus_describe_moe(self, config: Config) -> MoeDescription:
        return self.layout(config).describe(config)

    @hookimpl
    def nexus_enumerate_experts(self, config: Config) -> list[ExpertLocation]:
        return self.layout(config).locations(config)

    @hookimpl
    def nexus_read_expert(
        self, reader: CheckpointReader, config: Config, layer: int, expert: int, dtype: torch.dtype
    ) -> ExpertWeights:
        def read(part: TensorPart) -> torch.Tensor:
            return reader.read(part.name, part.index).to(dtype)

        return self.layout(config).read_expert(read, layer, expert)

    @hookimpl
    def nexus_read_expert_rows(
        self,
        reader: CheckpointReader,
        config: Config,
        layer: int,
        expert: int,
        projection: Projection,
        rows: slice,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, None]:
        part, place = self.layout(config).rows(config, layer, expert, projection, rows)
        return reader.read(part.name, part.index, place).to(dtype), None

    @hookimpl
    def nexus_stored_bytes(self, config: Config) -> dict[str, int]:
        from nexus_core.families.storage import stored_bytes

        return stored_bytes(self.layout(config), self.own_config(config))

    @hookimpl
    def nexus_load_model(self, folder: Path, config: Config, dtype: torch.dtype, device: str) -> nn.Module:
        """Base and converted checkpoints alike, as the extended class, so that additions can be attached."""
        from nexus_core.families.extended import extended_classes

        layout = self.layout(config)
        layout.describe(config)
        self.nexus_register_auto()
        classes = extended_classes(layout)
        own_config = classes.config.from_dict(self.own_config(config))
        model = classes.causal_lm.from_pretrained(folder, config=own_config, dtype=dtype)
        return model.to(device).eval()

    @hookimpl
    def nexus_register_auto(self) -> None:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping

        from nexus_core.families.extended import extended_classes
        from nexus_core.families.storage import conversions

        for layout in self.layouts:
            classes = extended_classes(layout)
            AutoConfig.register(layout.converted_model_type, classes.config, exist_ok=True)
            AutoModel.register(classes.config, classes.decoder, exist_ok=True)
            AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
            register_checkpoint_conversion_mapping(layout.converted_model_type, conversions(layout), overwrite=True)

    @hookimpl
    def nexus_moe_blocks(self, model: nn.Module) -> list[MoeBlock]:
        return _extended(model).moe_blocks()

    @hookimpl
    def nexus_gate_weights(
        self, config: Config, logits: torch.Tensor, router: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layout(config).route(config, logits, router)

    @hookimpl
    def nexus_neuron_activations(self, config: Config, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        from transformers.activations import ACT2FN

        from nexus_core.families.extended import gated

        return gated(ACT2FN[config.get("hidden_act", "silu")], gate, up)

    @hookimpl
    def nexus_attach_shared_expert(self, model: nn.Module, width: int) -> bool:
        _extended(model).attach_shared_expert(width)
        return True

    @hookimpl
    def nexus_attach_router_delta(self, model: nn.Module) -> bool:
        _extended(model).attach_router_delta()
        return True

    @hookimpl
    def nexus_shared_expert_tensors(
        self, config: Config, layer: int, weights: ExpertWeights
    ) -> dict[str, torch.Tensor]:
        import torch

        layout, dtype = self.layout(config), getattr(torch, number_type(config))
        return {
            layout.shared_expert_tensor(layer, projection): getattr(weights, projection).to(dtype).contiguous()
            for projection in PROJECTIONS
        }

    @hookimpl
    def nexus_converted_config(self, config: Config, width: int) -> dict[str, Any]:
        from nexus_core.families.extended import extended_classes

        layout = self.layout(config)
        return (
            {"dtype": number_type(config)}
            | dict(config)
            | {
                "model_type": layout.converted_model_type,
                "architectures": [extended_classes(layout).causal_lm.__name__],
                "shared_expert_width": width,
                "has_router_delta": False,
            }
        )


def _extended(model: nn.Module) -> ExtendedModel:
    from nexus_core.families.extended import ExtendedModel

    if not isinstance(model, ExtendedModel):
        raise UsageError(
            f"a {type(model).__name__} has no room for a shared expert; load the model with nexus_core.load"
        )
    return model
