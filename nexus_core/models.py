"""Loads any model NEXUS knows, base or converted, by folder, Hub id or embedded name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import UsageError
from nexus_core.plugins import installed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(
    name: str | Path | Checkpoint, *, dtype: torch.dtype | None = None, device: str = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """A transformers causal language model in evaluation mode, its routed experts still in their stored form.

    name: a folder, `embedded:NAME` or Hub id, of an untouched base or a converted or trained model. dtype: of the
    floating-point weights, by default the checkpoint's own. `model.name_or_path` is the folder that was read.
    Raises CheckpointError if it cannot be found, no plugin claims it, or a tensor is missing or unknown.
    """
    checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(name, revision)
    register_auto()
    model = checkpoint.family.hook.nexus_load_model(
        folder=checkpoint.folder, config=checkpoint.config, dtype=dtype or checkpoint.dtype, device=device
    )
    model.name_or_path = str(checkpoint.folder)
    return model


@lru_cache(maxsize=1)
def register_auto() -> None:
    """Let every installed family register its classes with transformers' Auto classes, once."""
    installed().hook.nexus_register_auto()


def choose_device(name: str) -> str:
    """The device to run on: `auto` is the first GPU, or the CPU where there is none; any other name as it is.

    Raises UsageError if torch does not know the name or this machine has no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device '{name}' is not known to torch; give `auto`, `cpu`, `cuda` or `cuda:1`") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{name}' is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "give `auto` or `cpu`"
        )
    return name


def compute_dtype(name: str, device: str) -> torch.dtype:
    """The type to compute in: `auto` is float32 on a CPU and bfloat16 on a GPU; else `float32` or `bfloat16`."""
    import torch

    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UsageError(f"compute type '{name}' is not known; give `auto`, `float32` or `bfloat16`")
    return known[name]
