"""DeepSpeed as this project uses it: how it is imported, configured, and told about mixture-of-experts modules."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import defaultdict
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import distributed, nn

from nexus_core.additions import Addition
from nexus_core.errors import UsageError
from nexus_core.plugins import Family
from nexus_core.recipe.schema import DeepSpeed
from nexus_core.types import MoeBlock

# Numbers in a buffer that is reduced or gathered at once: 200 MB, where DeepSpeed's default is 2 GB.
BUCKET = 50_000_000

# Chooses what DeepSpeed runs on where it would take a GPU that the run was told not to use.
ACCELERATOR = "DS_ACCELERATOR"


def deepspeed_library(device: torch.device) -> Any:
    """The module `deepspeed`, for computing on `device`. Raises UsageError if it is not installed."""
    os.environ.setdefault(ACCELERATOR, device.type)
    # It logs to what is the standard output when it is imported, and that belongs to the answer of a command.
    with redirect_stdout(sys.stderr):
        try:
            import deepspeed
        except ImportError as error:
            raise UsageError(
                f"run.deepspeed and --zero-stage need the package deepspeed, which cannot be imported ({error}); "
                "install it, or leave them out: several processes then hold a whole model each"
            ) from error
        # It warns that our optimizer is not one of its own, and torch, at every call, of names that it uses.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        if device.type == "cpu":
            _without_shared_memory_collectives(deepspeed)
        if not distributed.is_initialized():
            _meet_nobody(device)
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def _meet_nobody(device: torch.device) -> None:
    """Make the group of one process, which offloads: DeepSpeed would look for a launcher."""
    # Its number is, to DeepSpeed, that of its GPU.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def _without_shared_memory_collectives(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling an extension for CPUs, which takes a minute and fails without a compiler."""
    # A private dictionary, made by running compilers when it is first read; where it is missing, DeepSpeed compiles.
    if "__compatible_ops__" not in vars(deepspeed.ops):
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def configuration(
    settings: DeepSpeed, processes: int, computes_in: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration for the stage and offloading of a recipe, in float32 where it counts.

    computes_in: the model's type. Gradients are not clipped: it is our optimizer that does.
    """
    is_bfloat16 = computes_in == torch.bfloat16
    zero: dict[str, Any] = {
        # In bfloat16 it has an optimizer apart for stage 1, with other attributes than all others.
        "stage": max(settings.zero_stage, 2) if is_bfloat16 else settings.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "contiguous_gradients": True,
        "overlap_comm": device.type == "cuda",
        # Its own linear function, put in the place of torch's, rounds twice where there is a bias: in bfloat16 that is
        # not the base any more (gradients of a small model's router were off by a tenth).
        "memory_efficient_linear": False,
        # By default it takes whole blocks of some families, shared expert and router included.
        "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
    }
    on_cpu = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if settings.offload != "none":
        zero["offload_optimizer"] = on_cpu
    if settings.offload == "parameters":
        zero["offload_param"] = on_cpu
    chosen: dict[str, Any] = {
        "train_batch_size": processes,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own optimizer for CPUs is compiled for minutes, and is another one.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if is_bfloat16:
        chosen["bf16"] = {"enabled": True, "check_grad_overflow": True}
        chosen["data_types"] = {"grad_accum_dtype": "fp32"}
    return chosen


def leaf_modules(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules whose parameters stage 3 must gather together, because tokens decide which of them are used.

    Processes that took different experts would otherwise wait for each other's parameters for ever. In every MoE block
    that is what holds the experts, if it is called as a module; a mere list of experts is not, and then the block is.
    """
    blocks: list[MoeBlock] = family.hook.nexus_moe_blocks(model=model)
    return [leaf for found in blocks for leaf in _leaves(found)]


def _leaves(found: MoeBlock) -> list[nn.Module]:
    children = [child for child in found.block.children() if child is not found.router]
    frozen = [child for child in children if not any(isinstance(module, Addition) for module in child.modules())]
    if any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in frozen):
        return [found.block]
    return frozen
