"""DeepSeek-V3's layout, and the two ways in which its weights are stored: bfloat16, and fp8 with block scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.errors import CheckpointError
from nexus_core.families import Layout, after_dense_layers, group_limited_sigmoid, sums_to_one_if_unscaled
from nexus_core.families.layout import number_type
from nexus_core.families.rules import Config
from nexus_core.types import TensorPart

if TYPE_CHECKING:
    from nexus_core.checkpoint.reader import TensorEntry

FP8 = "fp8"
SCALE_SUFFIX = "_scale_inv"

# What a quantization_config may say: anything else is another storage, whatever its quant_method is called.
FP8_SETTINGS = {"quant_method": (FP8,), "fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
FP8_FREE_SETTINGS = {"weight_block_size", "scale_fmt"}


@dataclass(frozen=True)
class DeepseekLayout(Layout):
    """DeepSeek-V3's layout; with fp8 storage every matrix of a layer but the router's has block scales beside it."""

    def storage(self, config: Config) -> str:
        """Raises CheckpointError if the weights are quantized in a way that is not DeepSeek's own."""
        if config["model_type"] == self.converted_model_type:
            return str(config.get("expert_storage") or number_type(config))
        quantization = config.get("quantization_config")
        if not quantization:
            return number_type(config)
        for name, value in quantization.items():
            if name not in FP8_FREE_SETTINGS and value not in FP8_SETTINGS.get(name, ()):
                raise CheckpointError(
                    f"config.json: quantization_config.{name} is {value!r}: of DeepSeek-V3's quantized forms NEXUS "
                    "reads the published one only, fp8 e4m3 with block scales in every layer; use that, or bfloat16"
                )
        block_size(config)
        return FP8

    def parts(self, config: Config, layer: int, expert: int) -> tuple[TensorPart, ...]:
        matrices = super().parts(config, layer, expert)
        if self.storage(config) != FP8:
            return matrices
        return matrices + tuple(TensorPart(part.name + SCALE_SUFFIX) for part in matrices)

    def prepare(self, model: Any) -> None:
        if getattr(model.config, "expert_storage", None) == FP8:
            from nexus_deepseek.fp8 import replace_linears

            replace_linears(model, block_size(model.config.to_dict()))

    def check(self, entries: Mapping[str, TensorEntry], folder: Path) -> None:
        """transformers would cast a matrix of another type to fp8 without a word."""
        for name, entry in entries.items():
            if not name.endswith(SCALE_SUFFIX):
                continue
            matrix = entries.get(name.removesuffix(SCALE_SUFFIX))
            for found, needed in ((matrix, "F8_E4M3"), (entry, "F32")):
                if found is not None and found.dtype != needed:
                    raise CheckpointError(
                        f"{folder}: tensor '{found.name}' is {found.dtype}, not {needed}; download the checkpoint again"
                    )


def block_size(config: Config) -> tuple[int, int]:
    """Rows and columns of a block of numbers that share a scale. Raises CheckpointError if the config has none."""
    settings = config.get("quantization_config") or config
    found = settings.get("weight_block_size")
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise CheckpointError(
            f"config.json: weight_block_size is {found!r}, not two positive numbers, so fp8 has no scale"
        )
    return found[0], found[1]


deepseek_v3 = DeepseekLayout(
    model_type="deepseek_v3",
    gate_weights=group_limited_sigmoid,
    weights_sum_to_one=sums_to_one_if_unscaled,
    experts=("n_routed_experts", "num_local_experts"),
    layers=after_dense_layers,
    kept_float32=(SCALE_SUFFIX,),
    matrix_suffixes=(SCALE_SUFFIX,),
)
