"""DeepSpeed's ZeRO: optimizer (stage 1), gradients (2) and the frozen base too (3) lie in parts on all processes.

DeepSpeed moves and cuts; the numbers stay ours: the same AdamW, the same float32 masters, the same checkpoints. What is
used of it beyond its documented functions is named in `Masters`, and a test runs it at every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.plugins import Family
from nexus_core.processes import World, sum_in_place
from nexus_core.recipe.schema import DeepSpeed
from nexus_core.recipe.training import Train
from nexus_core.train.engines.cut_model import CutModel, HiddenStates
from nexus_core.train.engines.deepspeed_library import configuration, deepspeed_library, leaf_modules
from nexus_core.train.engines.engine import Change
from nexus_core.train.engines.masters import Masters
from nexus_core.train.on_demand import OnDemand
from nexus_core.train.optimizer import Optimizer, ParameterGroup, Part, adam_groups
from nexus_core.train.setup import Trainables

ADAM_STATE = ("exp_avg", "exp_avg_sq")


class _AskedAdamW(torch.optim.AdamW):
    """AdamW that clips, and lets groups stand still, or all of them, while DeepSpeed goes through its own motions.

    fixed: parts that stand still. is_asked: False lets all stand still. clip: what gradients are multiplied by, asked
    when the norm is known.
    """

    fixed: frozenset[Part] = frozenset()
    is_asked = True
    clip: Callable[[], float]

    def step(self, closure: Any = None) -> Any:
        if not self.is_asked:
            return None
        groups = self.param_groups
        # Not by taking their gradients away: offloaded, these are buffers of DeepSpeed's.
        self.param_groups = [group for group in groups if group["part"] not in self.fixed]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    flat.grad.mul_(self.clip())
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class ZeroEngine:
    """An `Engine` for stages 1 to 3. The model is cut when it is made, and of no use without it afterwards.

    trainables: of the model, ready. device: where this process computes; with stage 3 the model may still be on the
    CPU, its parts go to the device one by one. DeepSpeed cuts learning parameters of one type only, that of the shared
    experts: others, the float32 changes of routers in a bfloat16 model, stay whole in every process.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        trainables: Trainables,
        train: Train,
        settings: DeepSpeed,
        here: World,
        device: torch.device,
    ):
        self._deepspeed = deepspeed_library(device)
        self._here, self._settings = here, settings
        self._parameters = trainables.parameters
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(device)  # before anything holds on to where it is
        computes_in = next(iter(self._parameters.values())).dtype
        cut, uncut = _by_type(trainables.groups, computes_in)
        self._cut = {name: group.part for group in cut for name in group.parameters}
        groups = adam_groups(cut, self._parameters, weight_decay=train.weight_decay)
        numbers = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
        self._group_of = {name: numbers[id(self._parameters[name])] for name in self._cut}
        self._optimizer = _AskedAdamW(groups, lr=0.0, fused=True)
        self._uncut = Optimizer(uncut, weight_decay=train.weight_decay, keeps_copies=True)
        self._uncut_parameters = [parameter for group in uncut for parameter in group.parameters.values()]
        self._fixed: Collection[Part] = ()
        self._learning_rate = 0.0
        self._hooks = [
            parameter.register_hook(self._silencer(group.part))
            for group in trainables.groups
            for parameter in group.parameters.values()
        ]
        config = configuration(settings, here.size, computes_in, device)
        with _types_kept(model, computes_in):
            whole = HiddenStates(model)
            if settings.zero_stage == 3:
                for module in leaf_modules(model, family):
                    self._deepspeed.utils.set_z3_leaf_module(module, True)
                # Cut before DeepSpeed's engine sees it, which would round what is float32 in a bfloat16 model.
                self._deepspeed.zero.Init(module=whole, config_dict_or_path=config, dtype=computes_in)
            self._engine, *_ = self._deepspeed.initialize(
                model=whole, optimizer=self._optimizer, config=config, dist_init_required=False
            )
        self._masters = Masters(self._engine, self._optimizer, here, settings)
        self.model: Any = CutModel(model, self._engine)

    def begin(self, learning_rate: float, fixed: Collection[Part]) -> None:
        self._learning_rate, self._fixed = learning_rate, fixed
        self._optimizer.fixed = frozenset(fixed)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        # DeepSpeed's hooks begin at the output of the forward pass, which a loss over routers alone does not touch.
        loss = loss + self.model.hidden.flatten()[:0].sum().to(loss.dtype)
        self._engine.set_gradient_accumulation_boundary(is_last)
        # It divides the sum over processes by their number.
        self._engine.backward(loss * self._here.size)
        self.model.hidden = None

    def forget_gradients(self) -> None:
        self._uncut.forget_gradients()
        self._optimizer.is_asked = False
        try:
            self._engine.step()
        finally:
            self._optimizer.is_asked = True

    @torch.no_grad()
    def step(self, *, max_gradient_norm: float) -> float:
        squares = 0.0
        for gradient in self._uncut.gradients():
            sum_in_place(gradient).div_(self._here.size)
            squares += float(gradient.square().sum())
        if not math.isfinite(squares):
            self.forget_gradients()
            raise TrainingError(f"the gradient norm is {squares**0.5}")

        def norm() -> float:
            return math.sqrt(self._masters.gradient_norm**2 + squares)

        def clip() -> float:
            return min(1.0, max_gradient_norm / (norm() + 1e-6))

        self._optimizer.clip = clip
        self._engine.step()
        if not self._engine.was_step_applied() or not math.isfinite(norm()):
            self._uncut.forget_gradients()
            raise TrainingError(f"the gradient norm is {self._masters.gradient_norm}")
        for gradient in self._uncut.gradients():
            gradient.mul_(clip())
        with self.writing(self._uncut_parameters):
            self._uncut.step(self._learning_rate, max_gradient_norm=math.inf, fixed=self._fixed)
        return norm()

    def learning_rates(self) -> dict[Part, float]:
        groups = self._optimizer.param_groups
        rates = {group["part"]: 0.0 if group["part"] in self._fixed else group["lr"] for group in groups}
        return rates | self._uncut.learning_rates(self._learning_rate, fixed=self._fixed)

    @torch.no_grad()
    def change(self, change: Change) -> None:
        for name in self._cut:
            master = self._masters.whole(self._parameters[name])
            change(name, master)
            self._write(name, master)
        with self.writing(self._uncut_parameters):
            self._uncut.change(change)

    @torch.no_grad()
    def masters(self) -> Mapping[str, torch.Tensor]:
        cut = {name: self._masters.whole(self._parameters[name]).cpu() for name in self._cut}
        return cut | dict(self._uncut.masters())

    @contextmanager
    def writing(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        with self._gathered(parameters, changes=True):
            yield

    @torch.no_grad()
    def whole(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in parameters.items():
            if name in self._cut:
                tensor = self._masters.whole(parameter).to(parameter.dtype)
            else:
                with self._gathered([parameter]):
                    tensor = parameter.detach().clone()
            if self._here.is_first:
                found[name] = tensor.cpu()
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._write(name, tensor)

    @torch.no_grad()
    def state_tensors(self) -> OnDemand:
        # The masters of what is not cut are its float32 numbers, which `whole` gives.
        found = {key: tensor for key, tensor in self._uncut.state_tensors().items() if not key.startswith("master/")}

        def keep(key: str, tensor: torch.Tensor) -> None:
            if self._here.is_first:
                found[key] = tensor.cpu()

        for name in self._cut:
            parameter = self._parameters[name]
            if parameter.dtype != torch.float32:
                keep(f"master/{name}", self._masters.whole(parameter))
            keep(f"step/{name}", self._masters.steps(self._group_of[name]).clone())
            for kind in ADAM_STATE:
                keep(f"{kind}/{name}", self._masters.whole(parameter, kind))
        return OnDemand.of(found)

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in self._cut:
            parameter = self._parameters[name]
            if f"master/{name}" in tensors:
                self._write(name, tensors[f"master/{name}"])
            if f"step/{name}" not in tensors:
                continue
            self._masters.set_steps(self._group_of[name], tensors[f"step/{name}"])
            for kind in ADAM_STATE:
                self._masters.set(parameter, tensors[f"{kind}/{name}"], kind)
        masters = self._uncut.masters()
        of_uncut = {key: tensors[key] for key in tensors if key.partition("/")[2] in masters}
        with self.writing(self._uncut_parameters):
            self._uncut.load_state_tensors(of_uncut | {f"master/{name}": tensor for name, tensor in masters.items()})

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._uncut.close()
        self._engine.destroy()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        """Into a parameter and, if it learns by gradient, its master."""
        parameter = self._parameters[name]
        if name in self._cut:
            self._masters.set(parameter, tensor)
        with self._gathered([parameter], changes=True):
            if name in self._uncut.names:
                self._uncut.set_master(name, tensor)
            else:
                parameter.copy_(tensor)

    @contextmanager
    def _gathered(self, parameters: Sequence[nn.Parameter], *, changes: bool = False) -> Iterator[None]:
        if self._settings.zero_stage < 3:
            yield
            return
        # Every process changes it alike; DeepSpeed wants to know whose change counts.
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if changes else None):
            yield

    def _silencer(self, part: Part) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def silence(gradient: torch.Tensor) -> torch.Tensor | None:
            # Its gradient counts in no norm and moves no moment.
            return torch.zeros_like(gradient) if part in self._fixed else None

        return silence


def _by_type(groups: Sequence[ParameterGroup], dtype: torch.dtype) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
    """The groups with their parameters of one type, and with their others."""
    divided: tuple[list[ParameterGroup], list[ParameterGroup]] = ([], [])
    for group in groups:
        for part, is_of_type in zip(divided, (True, False), strict=True):
            members = {name: p for name, p in group.parameters.items() if (p.dtype == dtype) is is_of_type}
            if members:
                part.append(replace(group, parameters=members))
    return divided


@contextmanager
def _types_kept(model: nn.Module, computes_in: torch.dtype) -> Iterator[None]:
    """Undo what the engine rounds of a bfloat16 model, where it does not cut it."""
    is_rounded = computes_in != torch.float32
    exact = {each: each.data for each in model.parameters() if is_rounded and each.dtype == torch.float32}
    yield
    for parameter, numbers in exact.items():
        if not hasattr(parameter, "ds_id"):
            parameter.data = numbers.to(parameter.device)
