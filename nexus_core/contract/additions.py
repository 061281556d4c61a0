"""Additions change what they should and nothing else: zero, on, off, and in training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nexus_core.additions import RouterDelta, SharedExpert, additions, as_teacher
from nexus_core.contract.subject import Subject, raw, require, require_equal
from nexus_core.routing.parameters import is_selection_bias

TRAINING_STEPS = 2


def check_zero_additions(subject: Subject) -> None:
    """A shared expert with a zero down-projection and a router change of zero alter no logit."""
    model = subject.model()
    before = subject.logits(model)
    subject.hook.nexus_attach_shared_expert(model=model, width=8)
    require_equal(subject.logits(model), before, "nexus_attach_shared_expert: logits with a zero output")
    subject.hook.nexus_attach_router_delta(model=model)
    require_equal(subject.logits(model), before, "nexus_attach_router_delta: logits with a change of zero")
    found = [type(addition) for addition in additions(model)]
    layers = len(subject.checkpoint.description.layers)
    for kind in (SharedExpert, RouterDelta):
        require(
            found.count(kind) == layers, f"a model with {layers} MoE layers has {found.count(kind)} {kind.__name__}s"
        )
    deltas = [addition for addition in additions(model) if isinstance(addition, RouterDelta)]
    subject.hook.nexus_attach_router_delta(model=model)
    require(deltas == [addition for addition in additions(model) if isinstance(addition, RouterDelta)],
            "nexus_attach_router_delta: a model that has changes must be left alone")  # fmt: skip


def check_teacher(subject: Subject) -> None:
    """With its additions off a model is its base, to the bit; with them on it is not."""
    base, model = subject.logits(subject.model()), subject.extended()
    changed = subject.logits(model)
    require(not torch.equal(changed, base), "the additions change nothing, so they are not in the forward pass")
    with as_teacher(model):
        require_equal(subject.logits(model), base, "as_teacher: logits of the base")
    require_equal(subject.logits(model), changed, "as_teacher: logits after leaving it")


def check_training(subject: Subject) -> None:
    """Two steps of training change what is trainable, in every layer, and nothing else by a single bit."""
    model = subject.extended()
    # Selection biases are moved by rules, not by gradients.
    trainables: dict[str, nn.Parameter] = {
        name: parameter
        for name, parameter in subject.hook.nexus_trainable_parameters(model=model).items()
        if not is_selection_bias(name)
    }
    model.requires_grad_(False)
    for parameter in trainables.values():
        parameter.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainables.values(), lr=1e-2)
    for _ in range(TRAINING_STEPS):
        logits = model(subject.tokens, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), subject.tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        same = torch.equal(raw(tensor), raw(before[name]))
        require(name in trainables or same, f"training changes '{name}', which is frozen")
        require(name not in trainables or not same, f"training does not reach '{name}'")
