"""Loads any model NEXUS knows, base or converted, by folder, Hub id or embedded name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import UsageError
from nexus_core.plugins import installed
from nexus_core.processes import world

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


def stated_end_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end what the model writes, as its own generation settings state them; often incomplete."""
    stated = model.generation_config.eos_token_id if model.generation_config else None
    return [] if stated is None else list(stated) if isinstance(stated, list) else [stated]


def ignored_tensors(model: Any, names: Iterable[str]) -> frozenset[str]:
    """Which of a checkpoint's tensors the model's class leaves unread, as transformers' classes may say."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return frozenset(name for name in names if name not in own and any(re.search(p, name) for p in patterns))


@lru_cache(maxsize=1)
def register_auto() -> None:
    """Let every installed family register its classes with transformers' Auto classes, once."""
    installed().hook.nexus_register_auto()


def choose_device(name: str) -> str:
    """The device to run on: `auto` is the first GPU, or the CPU where there is none; any other name as it is.

    Each of several processes has a GPU of its own, by its number on the machine. Raises UsageError if torch does not
    know the name or this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not world().alone:
        name = f"cuda:{world().local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device '{name}' is not known to torch; give `auto`, `cpu`, `cuda` or `cuda:1`") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{name}' is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "give `auto` or `cpu`, or start no more processes than there are GPUs"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what libraries mean by the current one
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
