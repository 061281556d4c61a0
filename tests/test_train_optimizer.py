"""AdamW with float32 masters: the same steps as torch's AdamW on float32 parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from live_tensors import LiveTensors
from torch import nn

from nexus_core.errors import TrainingError
from nexus_core.train import float32_masters
from nexus_core.train.checkpoints import Position, write_position
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


class ObviousOptimizer:
    """What `Optimizer` is to the bit: a float32 tensor for every master, every gradient and every sum, all the time."""

    def __init__(self, groups: list[ParameterGroup], weight_decay: float):
        self.groups = groups
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in self.parameters.items()}
        settings = [
            {"params": [self.masters[name]], "weight_decay": weight_decay if p.ndim == 2 else 0.0}
            for name, p in self.parameters.items()
        ]
        self.adam = torch.optim.AdamW(settings, lr=0.0, fused=True)

    def add_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            gradient, parameter.grad = parameter.grad.float(), None
            master = self.masters[name]
            master.grad = gradient if master.grad is None else master.grad + gradient

    def step(self, learning_rate: float, max_gradient_norm: float, fixed: list[str]) -> float:
        places = [group for group in self.groups for _ in group.parameters]
        for place, settings, master in zip(places, self.adam.param_groups, self.masters.values(), strict=True):
            settings["lr"] = learning_rate * place.lr_multiplier
            if place.part in fixed:
                master.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), max_gradient_norm))
        if math.isfinite(norm):
            self.adam.step()
        self.adam.zero_grad()
        for name, parameter in self.parameters.items():
            master = self.masters[name].detach()
            parameter.data.copy_(rounded(master) if parameter.dtype == torch.bfloat16 else master)
        return norm


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    """To the nearest bfloat16, halves away from zero."""
    bits = numbers.view(torch.int32).long()
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def layer(dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """A matrix, a bias and a router's float32 change; their numbers of elements are no multiples of a vector."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(37, 21, generator=generator) / 10, torch.randn(37, generator=generator)
    return nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype)), nn.Parameter(torch.zeros(5, 37))


def groups_of(weight: nn.Parameter, bias: nn.Parameter, router: nn.Parameter) -> list[ParameterGroup]:
    shared = ParameterGroup({"weight": weight, "bias": bias})
    return [shared, ParameterGroup({"router": router}, lr_multiplier=0.1, part="router_weights")]


def micro_losses(weight: nn.Parameter, bias: nn.Parameter, router: nn.Parameter, step: int, number: int) -> Iterator:
    generator = torch.Generator().manual_seed(step)
    for _ in range(number):
        x = torch.randn(11, weight.shape[1], generator=generator).to(weight.dtype)
        hidden = torch.tanh(x @ weight.T + bias).float()
        loss = hidden.square().sum() + (hidden @ router.T).exp().sum()
        yield loss * (math.inf if step == 3 else 1.0)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("piece_numbers", [2**18, 64])
@pytest.mark.parametrize("max_gradient_norm", [1.0, 1e6])
def test_steps_are_to_the_bit_those_of_whole_float32_masters(
    accumulation, piece_numbers, max_gradient_norm, monkeypatch
) -> None:
    monkeypatch.setitem(float32_masters.PIECE_NUMBERS, "cpu", piece_numbers)
    ours, theirs = layer(torch.bfloat16), layer(torch.bfloat16)
    optimizer, obvious = Optimizer(groups_of(*ours), weight_decay=0.1), ObviousOptimizer(groups_of(*theirs), 0.1)
    for step in range(12):
        fixed = ["router_weights"] if step > 7 else []
        for loss in micro_losses(*ours, step, accumulation):
            loss.backward()
        for loss in micro_losses(*theirs, step, accumulation):
            loss.backward()
            obvious.add_gradients()
        expected_norm = obvious.step(3e-3, max_gradient_norm, fixed)
        if step == 3:
            with pytest.raises(TrainingError, match="gradient norm is"):
                optimizer.step(3e-3, max_gradient_norm=max_gradient_norm, fixed=fixed)
        else:
            assert optimizer.step(3e-3, max_gradient_norm=max_gradient_norm, fixed=fixed) == expected_norm
        assert_same_bits(optimizer.masters(), obvious.masters)
        assert all(torch.equal(own, right) for own, right in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0].float(), optimizer.masters()["weight"])
    assert not torch.equal(ours[0], layer(torch.bfloat16)[0])


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(tensor.detach(), expected[name].detach()) for name, tensor in found.items())


def test_a_step_holds_fourteen_bytes_a_number_and_one_parameters_temporaries() -> None:
    number = 256 * 256
    layers = [nn.Parameter(torch.randn(256, 256).bfloat16()) for _ in range(12)]
    optimizer = Optimizer([ParameterGroup({f"layers.{i}": layer for i, layer in enumerate(layers)})])

    def backward() -> None:
        for parameter in layers:
            (parameter * 0.5).sum().backward()

    backward()
    optimizer.step(1e-3, max_gradient_norm=1.0)  # moments exist from here on
    before = {id(parameter): parameter.detach().clone() for parameter in layers}
    with LiveTensors() as live:
        backward()
        assert live.live_bytes == pytest.approx(2 * 12 * number, rel=0.01)  # gradients, as they came
        # The norm, too, is taken without copies; then one float32 gradient and one master beside what there is.
        held, live.peak_bytes = live.live_bytes, live.live_bytes
        optimizer.step(1e-3, max_gradient_norm=1.0)
        assert live.peak_bytes - held < (4 + 4) * number * 1.05
        assert live.live_bytes < 0.01 * number
        backward()
        backward()
        assert live.live_bytes == pytest.approx(4 * 12 * number, rel=0.01)  # sums are float32
        optimizer.forget_gradients()
        assert live.live_bytes < 0.01 * number
    assert all(not torch.equal(parameter, before[id(parameter)]) for parameter in layers)


def test_an_optimizer_holds_ten_bytes_a_number_beside_a_bfloat16_parameter() -> None:
    parameter = nn.Parameter(torch.randn(512, 512).bfloat16())
    with LiveTensors() as live:
        optimizer = Optimizer([ParameterGroup({"weight": parameter})])
        assert live.live_bytes == 2 * parameter.numel()
        parameter.sum().backward()
        optimizer.step(1e-3, max_gradient_norm=1.0)
        assert live.live_bytes == pytest.approx((2 + 8) * parameter.numel(), rel=0.01)


def test_a_checkpoint_is_written_one_master_at_a_time(tmp_path) -> None:
    number = 256 * 256
    layers = {f"layers.{i}": nn.Parameter(torch.randn(256, 256).bfloat16()) for i in range(12)}
    optimizer = Optimizer([ParameterGroup(layers)])
    sum(parameter.sum() for parameter in layers.values()).backward()
    optimizer.step(1e-3, max_gradient_norm=1.0)
    with LiveTensors() as live:
        folder = write_position(tmp_path, 1, layers, optimizer.state_tensors(), {}, keep=1)
    assert live.peak_bytes <= 2 * 4 * number
    assert_same_bits(
        dict(sorted(Position.read(folder).optimizer.items())), dict(sorted(optimizer.state_tensors().items()))
    )


def test_gradients_for_other_processes_are_float32_sums() -> None:
    weight, bias, router = layer(torch.bfloat16)
    optimizer = Optimizer(groups_of(weight, bias, router))
    for loss in micro_losses(weight, bias, router, 0, 1):
        loss.backward()
    little = 2.0**-10
    for gradient in optimizer.gradients():
        assert gradient.dtype == torch.float32
        gradient.fill_(1.0).add_(little)  # in bfloat16 it would be lost
    expected = math.sqrt(weight.numel() + bias.numel() + router.numel()) * (1 + little)
    assert optimizer.step(0.0, max_gradient_norm=1.0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("keeps_copies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masters_are_copies_and_change_reaches_the_parameters(dtype, keeps_copies) -> None:
    given = parameters(dtype)
    optimizer = Optimizer([ParameterGroup(given)], keeps_copies=keeps_copies)
    optimizer.masters()["weight"].fill_(7.0)
    assert_same_bits(given, parameters(dtype))
    small = 2.0**-20

    def change(name: str, master: torch.Tensor) -> None:
        assert master.dtype == torch.float32
        assert master.shape == given[name].shape
        master.fill_(1.0 + small)

    optimizer.change(change)
    assert all(torch.equal(parameter, torch.full_like(parameter, 1.0 + small)) for parameter in given.values())
    assert all((master == 1.0 + small).all() for master in optimizer.masters().values())


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
    # Files give them in an order of their own.
    state = reversed(list(before.state_tensors().items()))
    after.load_state_tensors({name: tensor.clone() for name, tensor in state})
    for step in range(2, 4):
        backward(second, step)
        after.step(1e-2, max_gradient_norm=1.0)
    assert_same_bits(second, whole)
    assert_same_bits(after.state_tensors(), undisturbed.state_tensors())
    # So that a checkpoint's file is the same to the byte too.
    assert list(after.state_tensors()) == list(undisturbed.state_tensors())
    kinds = {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if dtype == torch.bfloat16 else set())
    assert {key.partition("/")[0] for key in undisturbed.state_tensors()} == kinds
    assert all(tensor.dtype == torch.float32 for tensor in undisturbed.state_tensors().values())


def test_close_leaves_no_hook_behind() -> None:
    given = parameters(torch.bfloat16)
    optimizer = Optimizer([ParameterGroup(given)])
    optimizer.close()
    backward(given, 0)
    assert given["weight"].grad is not None
