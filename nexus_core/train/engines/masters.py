"""The float32 numbers and AdamW's state of parameters that DeepSpeed has cut into parts, as whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.processes import World
from nexus_core.recipe.schema import DeepSpeed


class Masters:
    """Reads and writes them through `deepspeed.utils.safe_*`; all processes call the same methods.

    Undocumented, and so the place to look when a new version of DeepSpeed breaks: the optimizer's attributes
    `single_partition_of_fp32_groups` (stages 1, 2), `fp32_partitioned_groups_flat` and `sub_group_to_group_id` (stage
    3), which are what AdamW's state hangs on; `_lazy_init_hp_params_optimizer_state` (stages 1, 2), which links that
    state to parameters; `_global_grad_norm`, which is set before AdamW steps; and a parameter's `ds_tensor` (stage 3),
    its part.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.AdamW, here: World, settings: DeepSpeed):
        from deepspeed import utils

        self._safe, self._zero, self._adam = utils, engine.optimizer, optimizer
        self._here, self._is_stage3 = here, settings.zero_stage == 3
        name = "fp32_partitioned_groups_flat" if self._is_stage3 else "single_partition_of_fp32_groups"
        self._flats: list[torch.Tensor] = getattr(self._zero, name, [])
        if not self._flats:
            raise TrainingError(
                f"this version of DeepSpeed has no {name} in its {type(self._zero).__name__}; install the one in "
                "constraints.txt, or train without run.deepspeed"
            )
        self._make_state()

    @property
    def gradient_norm(self) -> float:
        """Of the step that is being made, over all parts; -1 or infinite if it is not finite."""
        return float(self._zero._global_grad_norm)

    def whole(self, parameter: nn.Parameter, kind: str | None = None) -> torch.Tensor:
        """A parameter's float32 numbers, or its optimizer state of a kind such as `exp_avg`, in its shape."""
        if kind is None:
            return self._safe.safe_get_full_fp32_param(parameter).clone()
        return self._safe.safe_get_full_optimizer_state(parameter, kind)

    def set(self, parameter: nn.Parameter, whole: torch.Tensor, kind: str | None = None) -> None:
        """Take over this process's part of `whole`."""
        whole = whole.to(parameter.device, torch.float32)
        if not self._is_stage3:
            if kind is None:
                self._safe.safe_set_full_fp32_param(parameter, whole)
            else:
                self._safe.safe_set_full_optimizer_state(parameter, whole, kind)
            return
        # safe_set_full_* fails where a tensor cannot be divided evenly.
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = whole.new_zeros(part * self._here.size)
        padded[: whole.numel()] = whole.flatten()
        ours = padded[self._here.rank * part : (self._here.rank + 1) * part]
        if kind is None:
            self._safe.safe_set_local_fp32_param(parameter, ours)
        else:
            self._safe.safe_set_local_optimizer_state(parameter, ours, kind)

    def _make_state(self) -> None:
        # AdamW makes it in its first step, and DeepSpeed links it to parameters then, but only of the first group.
        for flat in self._flats:
            self._adam.state[flat] |= {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if not self._is_stage3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def steps(self, group: int) -> torch.Tensor:
        """How many steps AdamW has made in one of its groups, as its state has it."""
        steps: torch.Tensor = self._adam.state[self._flats_of(group)[0]]["step"]
        return steps

    def set_steps(self, group: int, steps: torch.Tensor) -> None:
        """Let AdamW go on counting from there."""
        for flat in self._flats_of(group):
            self._adam.state[flat]["step"].copy_(steps)

    def _flats_of(self, group: int) -> list[torch.Tensor]:
        if not self._is_stage3:
            return [self._flats[group]]
        return [flat for number, flat in enumerate(self._flats) if self._zero.sub_group_to_group_id[number] == group]
