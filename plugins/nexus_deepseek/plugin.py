"""DeepSeek-V3's answers to NEXUS: those of its layout, and what fp8 storage does otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nexus_core.families import TransformersFamilies
from nexus_core.families.layout import Projection
from nexus_core.families.rules import Config
from nexus_core.hookspecs import hookimpl
from nexus_core.types import ExpertWeights, MoeBlock, TensorPart
from nexus_deepseek.layout import FP8, SCALE_SUFFIX, block_size, deepseek_v3

if TYPE_CHECKING:
    import torch

    from nexus_core.checkpoint.reader import CheckpointReader

VALUES, SCALES = "values", "scales"


class Deepseek(TransformersFamilies):
    @hookimpl
    def nexus_read_expert(
        self, reader: CheckpointReader, config: Config, layer: int, expert: int, dtype: torch.dtype
    ) -> ExpertWeights:
        """Read from its own tensors: three, or six where each has scales."""
        layout = self.layout(config)
        if layout.storage(config) != FP8:
            return super().nexus_read_expert(reader, config, layer, expert, dtype)

        def read(part: TensorPart) -> torch.Tensor:
            tensors = {VALUES: reader.read(part.name), SCALES: reader.read(part.name + SCALE_SUFFIX)}
            return self.decoded(config, tensors, dtype)

        return layout.read_expert(read, layer, expert)

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
        """Of an fp8 matrix, read and decoded from the beginning of the first block they touch."""
        layout = self.layout(config)
        if layout.storage(config) != FP8:
            return super().nexus_read_expert_rows(reader, config, layer, expert, projection, rows, dtype)
        part, place = layout.rows(config, layer, expert, projection, rows)
        length = block_size(config)[0]
        first, last = place.start // length, -(-place.stop // length)
        tensors = {
            VALUES: reader.read(part.name, None, slice(first * length, place.stop)),
            SCALES: reader.read(part.name + SCALE_SUFFIX, None, slice(first, last)),
        }
        return self.decoded(config, tensors, dtype)[place.start - first * length :], None

    @hookimpl
    def nexus_dequantize(
        self, config: Config, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Roles: "values" and "scales" of an fp8 matrix. Any other set is left to core's default."""
        return self.decoded(config, tensors, dtype) if set(tensors) == {VALUES, SCALES} else None

    def decoded(self, config: Config, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """An fp8 matrix as numbers of type dtype."""
        from nexus_deepseek.fp8 import decode

        return decode(tensors[VALUES], tensors[SCALES], block_size(config), dtype)

    @hookimpl
    def nexus_expert_weights(self, block: MoeBlock, expert: int, dtype: torch.dtype) -> ExpertWeights | None:
        """Of an fp8 model, decoded anew at each call; a dense one is left to core's default."""
        from nexus_deepseek.fp8 import Fp8Experts

        experts: Any = getattr(block.block, "experts", None)
        return experts.expert(expert, dtype) if isinstance(experts, Fp8Experts) else None

    @hookimpl
    def nexus_converted_config(self, config: Config, width: int) -> dict[str, Any]:
        """Without quantization_config, which would make transformers put in its own modules or dequantize."""
        layout = self.layout(config)
        converted = super().nexus_converted_config(config, width)
        if layout.storage(config) == FP8:
            converted |= {"expert_storage": FP8, "weight_block_size": list(block_size(config))}
            converted.pop("quantization_config", None)
        return converted


families = Deepseek(deepseek_v3)
