"""Packed experts against transformers' dense ones and against autograd."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from nexus_gpt_oss.experts import PackedExperts, swiglu
from packed_layers import ALPHA, LIMIT, answers, dense_experts, dense_matrix, packed_experts, routed_inputs
from torch.utils.checkpoint import checkpoint as recompute

from nexus_core.errors import ShapeError


def product_depends_on_layout(module: PackedExperts, inputs: torch.Tensor) -> bool:
    """Whether this machine's bfloat16 product rounds differently when the same matrix is stored transposed."""
    matrices = dense_matrix(module, "gate_up_proj")[0], dense_matrix(module, "down_proj")[0]
    for matrix in (matrix.to(inputs.dtype) for matrix in matrices):
        for weight in (matrix, matrix.T.contiguous()):
            rows = inputs.detach()[:, :32].repeat(1, 2)[:, : weight.shape[1]]
            if not torch.equal(rows @ weight.T, rows @ weight.T.contiguous()):
                return True
    return False


@pytest.mark.parametrize("tokens", [1, 5, 80])
def test_bfloat16_output_and_gradients_equal_the_dense_experts_to_the_bit(tokens: int) -> None:
    packed = packed_experts().bfloat16()
    inputs = routed_inputs(packed, tokens, 2, torch.bfloat16)
    if product_depends_on_layout(packed, inputs[0]):
        pytest.skip("dense experts are stored transposed, and this processor's products then round differently")
    for mine, theirs in zip(
        answers(packed, *inputs), answers(dense_experts(packed, torch.bfloat16), *inputs), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("tokens", [1, 5, 80])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_output_and_gradients_equal_the_dense_experts(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    # The order of operations is the same; within a product of few rows the transposed layout sums in another order.
    packed = packed_experts().to(dtype)
    inputs = routed_inputs(packed, tokens, 3, dtype)
    for mine, theirs in zip(answers(packed, *inputs), answers(dense_experts(packed, dtype), *inputs), strict=True):
        assert (mine - theirs).norm() / theirs.norm() < tolerance


def test_gradients_are_the_numerical_derivatives() -> None:
    packed = packed_experts(experts=4, hidden=32, width=32).double()
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: packed(h, indices_TK, w), (hidden_TD, weights_TK))


@pytest.mark.parametrize("learns", ["hidden", "weights"])
def test_only_what_is_asked_for_gets_a_gradient(learns: str) -> None:
    packed = packed_experts()
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 9, 2, torch.float32)
    both = torch.autograd.grad(packed(hidden_TD, indices_TK, weights_TK).sum(), (hidden_TD, weights_TK))
    given = {"hidden": hidden_TD, "weights": weights_TK}
    inputs = {name: tensor if name == learns else tensor.detach() for name, tensor in given.items()}
    (gradient,) = torch.autograd.grad(packed(inputs["hidden"], indices_TK, inputs["weights"]).sum(), inputs[learns])
    assert torch.equal(gradient, both[0] if learns == "hidden" else both[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_gradients_are_the_same(use_reentrant: bool) -> None:
    packed = packed_experts()
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 40, 2, torch.float32)
    plain = torch.autograd.grad(packed(hidden_TD, indices_TK, weights_TK).square().sum(), (hidden_TD, weights_TK))
    output_TD = recompute(packed, hidden_TD, indices_TK, weights_TK, use_reentrant=use_reentrant)
    output_TD.square().sum().backward()
    assert torch.equal(hidden_TD.grad, plain[0])
    assert torch.equal(weights_TK.grad, plain[1])


def test_nothing_of_a_dense_expert_is_kept_for_backward() -> None:
    packed = packed_experts(experts=6, hidden=128, width=96)
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 7, 2, torch.float32)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output_TD = packed(hidden_TD, indices_TK, weights_TK)
    smallest_expert_matrix = 128 * 96
    parameters = {parameter.data_ptr() for parameter in packed.parameters()}
    assert any(tensor.dtype == torch.uint8 for tensor in saved)
    for tensor in saved:
        assert tensor.numel() < smallest_expert_matrix or tensor.data_ptr() in parameters
    # Nor is one alive anywhere else while the graph is.
    gc.collect()
    alive = [found for found in gc.get_objects() if is_dense_matrix(found, {(192, 128), (128, 96)})]
    assert not alive
    assert output_TD.requires_grad


def is_dense_matrix(found: Any, shapes: set[tuple[int, ...]]) -> bool:
    return type(found) is torch.Tensor and found.is_floating_point() and tuple(found.shape[-2:]) in shapes


def test_packed_bytes_survive_every_cast() -> None:
    packed = packed_experts()
    before = {name: parameter.clone() for name, parameter in packed.named_parameters()}
    for cast in (packed.float, packed.double, packed.bfloat16, packed.half, packed.float):
        cast()
        for name, parameter in packed.named_parameters():
            assert not parameter.requires_grad
            if name.endswith("_bias"):
                assert parameter.is_floating_point()
            else:
                assert parameter.dtype == torch.uint8
                assert torch.equal(parameter, before[name])


def test_no_tokens_give_no_output() -> None:
    packed = packed_experts()
    assert packed(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 64)


def test_an_expert_that_is_not_there_is_refused() -> None:
    packed = packed_experts(experts=6)
    with pytest.raises(ShapeError, match="expert 6 of experts 0-5"):
        packed(torch.zeros(1, 64), torch.tensor([[0, 6]]), torch.ones(1, 2))


def test_activation_clamps_gate_above_and_up_on_both_sides() -> None:
    gate = torch.tensor([9.0, 7.0, -9.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    up = torch.tensor([0.0, 0.0, 0.0, 5.0, 9.0, -9.0], dtype=torch.float64)
    clamped_gate = torch.tensor([7.0, 7.0, -9.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    clamped_up = torch.tensor([0.0, 0.0, 0.0, 5.0, 7.0, -7.0], dtype=torch.float64)
    expected = clamped_gate / (1 + torch.exp(-ALPHA * clamped_gate)) * (clamped_up + 1)
    torch.testing.assert_close(swiglu(gate, up, alpha=ALPHA, limit=LIMIT), expected)


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    packed = packed_experts()
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 80, 2, torch.float32)
    expected = answers(packed, hidden_TD, indices_TK, weights_TK)
    packed.cuda()
    on_gpu = [tensor.detach().cuda() for tensor in (hidden_TD, weights_TK)]
    found = answers(packed, on_gpu[0].requires_grad_(), indices_TK.cuda(), on_gpu[1].requires_grad_())
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.cpu() - theirs).norm() / theirs.norm() < 1e-4
