"""Readies a model for training: what learns, at which rate, and everything else frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from nexus_core.additions import RouterDelta
from nexus_core.distill.signals import OF_THE_TEACHER, Signals
from nexus_core.errors import TrainingError
from nexus_core.plugins import Family
from nexus_core.routing import ROUTER_DELTA, RouterPlan
from nexus_core.routing.parameters import is_bias, is_selection_bias
from nexus_core.train.optimizer import ParameterGroup, Part
from nexus_core.types import Strategy


@dataclass(frozen=True)
class Loss:
    """A term of the training loss: its strategy, its weight, and the parameters its function is called with."""

    strategy: Strategy
    weight: float
    parameters: BaseModel | None = None

    @property
    def name(self) -> str:
        return self.strategy.name

    @property
    def compares(self) -> bool:
        """Whether it looks at the teacher; such losses' weights can be warmed up."""
        return bool(self.strategy.needs & OF_THE_TEACHER)

    def __call__(self, signals: Signals) -> torch.Tensor:
        return self.strategy.function(signals, self.parameters)


@dataclass(frozen=True)
class Objective:
    """What a run trains for and what of the router it may change. losses: those with a weight, at least one."""

    losses: tuple[Loss, ...]
    routing: Strategy
    routing_parameters: BaseModel | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The signals that the losses read; no other is computed."""
        return frozenset().union(*(loss.strategy.needs for loss in self.losses))


@dataclass(frozen=True)
class Trainables:
    """What of a model learns: by gradient, in groups, shared experts first; and by rule, the selection biases.

    selection_biases: by name, in the order of the layers; empty where the plan has no rule for them.
    """

    groups: tuple[ParameterGroup, ...]
    plan: RouterPlan
    selection_biases: dict[str, nn.Parameter]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All of them by name."""
        learnt = {name: parameter for group in self.groups for name, parameter in group.parameters.items()}
        return learnt | self.selection_biases


def ready_parameters(model: nn.Module, family: Family, objective: Objective, bias_lr_multiplier: float) -> Trainables:
    """Freeze the model, give its routers a change if the routing strategy needs one, and return what learns.

    Raises TrainingError if the family names nothing to train.
    """
    if ROUTER_DELTA in objective.routing.needs:
        family.hook.nexus_attach_router_delta(model=model)
    model.requires_grad_(False)
    trainables: dict[str, nn.Parameter] = family.hook.nexus_trainable_parameters(model=model)
    router_names = router_parameter_names(model)
    shared = {name: parameter for name, parameter in trainables.items() if name not in router_names}
    if not shared:
        raise TrainingError("the model has nothing to train: no shared expert was found in it; run nexus convert first")
    by_rule = [name for name in trainables if name in router_names and is_selection_bias(name)]
    by_gradient = [name for name in trainables if name in router_names and not is_selection_bias(name)]
    plan = RouterPlan.of(objective.routing.function(by_gradient, bias_lr_multiplier, objective.routing_parameters))
    groups = [ParameterGroup(shared)]
    kinds = {name: (_part(name), multiplier) for name, multiplier in plan.lr_multipliers.items()}
    for part, multiplier in sorted(set(kinds.values()), key=lambda kind: (-kind[1], kind[0])):
        members = {name: trainables[name] for name, kind in kinds.items() if kind == (part, multiplier)}
        groups.append(ParameterGroup(members, multiplier, part))
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    return Trainables(tuple(groups), plan, {name: trainables[name] for name in by_rule} if plan.selection_step else {})


def _part(name: str) -> Part:
    return "router_biases" if is_bias(name) else "router_weights"


def router_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters of all router changes in the model."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, RouterDelta)
        for name, _ in module.named_parameters()
    }


def can_recompute(model: Any) -> bool:
    """Whether the model's layers have transformers' switch for computing activations again."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def recompute_activations(model: Any) -> None:
    """Let the layers compute their activations again in the backward pass. Raises TrainingError if they cannot.

    The model stays in evaluation mode, without dropout; only the layers' own switch is set to training, because
    transformers recomputes in no other mode. Not reentrant: what hooks caught must keep its graph.
    """
    if not can_recompute(model):
        raise TrainingError(
            f"{type(model).__name__} cannot compute activations again: its class does not say "
            "`supports_gradient_checkpointing = True`; set train.gradient_checkpointing: false"
        )
    # transformers 5.23 renamed it; both take the same first argument.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # What it switches on for reentrant recomputation only would send gradients down to the embeddings.
    model.disable_input_require_grads()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
