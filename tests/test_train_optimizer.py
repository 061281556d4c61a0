"""AdamW with float32 masters: the same steps as torch's AdamW on float32 parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.train.optimizer import Optimizer, ParameterGroup


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)),
        "bias": nn.Parameter(torch.randn(4, generator=generator).to(dtype)),
    }


def backward(given: dict[str, nn.Parameter], step: int) -> None:
    """Two micro-batches' gradients."""
    for part in range(2):
        generator = torch.Generator().manual_seed(10 * step + part)
        x = torch.randn(5, 3, generator=generator)
        output = x.to(given["weight"].dtype) @ given["weight"].T + given["bias"]
        output.float().square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torchs_adamw_on_float32(dtype) -> None:
    ours, reference = parameters(dtype), parameters(dtype)
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in reference.items()}
    adam = torch.optim.AdamW(
        [{"params": [masters["weight"]], "weight_decay": 0.1}, {"params": [masters["bias"]], "weight_decay": 0.0}],
        lr=1e-2,
    )
    optimizer = Optimizer([ParameterGroup(ours)], weight_decay=0.1)
    for step in range(5):
        backward(ours, step)
        norm = optimizer.step(1e-2, max_gradient_norm=1.0)
        totals = {name: torch.zeros_like(master) for name, master in masters.items()}
        for name, parameter in reference.items():
            parameter.data.copy_(masters[name])
        backward_parts(reference, step, totals)
        for name, master in masters.items():
            master.grad = totals[name]
        expected_norm = nn.utils.clip_grad_norm_(masters.values(), 1.0)
        adam.step()
        assert norm == pytest.approx(float(expected_norm), rel=1e-6)
    for name, master in masters.items():
        torch.testing.assert_close(ours[name].detach(), master.detach().to(dtype))


def backward_parts(given: dict[str, nn.Parameter], step: int, totals: dict[str, torch.Tensor]) -> None:
    for part in range(2):
        generator = torch.Generator().manual_seed(10 * step + part)
        x = torch.randn(5, 3, generator=generator)
        output = x.to(given["weight"].dtype) @ given["weight"].T + given["bias"]
        output.float().square().sum().backward()
        for name, parameter in given.items():
            totals[name] += parameter.grad.float()
            parameter.grad = None


def test_small_steps_add_up_in_bfloat16_parameters() -> None:
    parameter = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimizer = Optimizer([ParameterGroup({"weight": parameter})])
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step(1e-4, max_gradient_norm=1.0)
    # One step is a fortieth of what bfloat16 can tell apart at 1; a hundred of them are not.
    assert parameter.item() == pytest.approx(0.99, abs=0.003)


def test_groups_have_their_own_rate_and_a_fixed_router_does_not_move() -> None:
    shared, bias, router = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = Optimizer(
        [
            ParameterGroup({"shared": shared}),
            ParameterGroup({"bias": bias}, lr_multiplier=0.1, part="router_biases"),
            ParameterGroup({"router": router}, part="router_weights"),
        ],
        weight_decay=0.5,
    )
    (shared + bias + router).sum().backward()
    norm = optimizer.step(1e-2, max_gradient_norm=100.0, fixed=["router_weights"])
    assert norm == pytest.approx(math.sqrt(8))  # the router's gradient does not count
    assert torch.equal(router, torch.ones(2, 2))
    rates = {"shared_experts": 1e-2, "router_biases": 1e-3, "router_weights": 0.0}
    assert optimizer.learning_rates(1e-2, fixed=["router_weights"]) == pytest.approx(rates)
    moved, slowly = (1 - shared).mean().item(), (1 - bias).mean().item()
    assert moved == pytest.approx(10 * slowly, rel=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    given = parameters(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in given.items()}
    optimizer = Optimizer([ParameterGroup(given)])
    (given["weight"].sum() * math.inf).backward()
    with pytest.raises(TrainingError, match="gradient norm is"):
        optimizer.step(1e-2, max_gradient_norm=1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in given.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_whole(dtype) -> None:
    whole, first, second = (parameters(dtype) for _ in range(3))
    undisturbed, before = Optimizer([ParameterGroup(whole)]), Optimizer([ParameterGroup(first)])
    for step in range(4):
        backward(whole, step)
        undisturbed.step(1e-2, max_gradient_norm=1.0)
    for step in range(2):
        backward(first, step)
        before.step(1e-2, max_gradient_norm=1.0)
    after = Optimizer([ParameterGroup(second)])
    for name, parameter in first.items():
        second[name].data.copy_(parameter)
    after.load_state_tensors({name: tensor.clone() for name, tensor in before.state_tensors().items()})
    for step in range(2, 4):
        backward(second, step)
        after.step(1e-2, max_gradient_norm=1.0)
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_close_leaves_no_hook_behind() -> None:
    given = parameters(torch.bfloat16)
    optimizer = Optimizer([ParameterGroup(given)])
    optimizer.close()
    backward(given, 0)
    assert given["weight"].grad is not None
