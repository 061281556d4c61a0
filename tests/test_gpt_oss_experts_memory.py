"""Bytes that sorted packed experts hold at once: counted, in units of a number for each row and hidden dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors
from nexus_gpt_oss import execution
from nexus_gpt_oss.backends import grouped, rows, sorted_rows
from nexus_gpt_oss.backends.rows import sort_by_expert
from packed_layers import answers, packed_experts, routed_inputs

# In proportion a layer of gpt-oss-120b at 8,192 tokens: as wide as deep, four experts a token, a slice a quarter of the
# rows and a piece a sixteenth of them.
WIDTH, EXPERTS, TOKENS, PER_TOKEN = 128, 16, 1024, 4
ROWS = TOKENS * PER_TOKEN
UNIT = ROWS * WIDTH * 2
BUFFER = 4 * WIDTH * WIDTH * 2  # bytes: two experts' gate_up


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", "grouped")
    monkeypatch.setattr(grouped, "buffer_bytes", lambda: BUFFER)
    # As on a GPU: decoded into no block that stays, multiplied by torch's grouped product.
    monkeypatch.setattr(grouped, "workspace", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(grouped, "multiply_in_turn", grouped.multiply_by_torch)
    monkeypatch.setattr(rows, "ROWS_AT_A_TIME", ROWS // 16)
    monkeypatch.setattr(sorted_rows, "SLICE_ROWS", ROWS // 4)
    execution.forget()
    yield
    execution.forget()


@pytest.fixture
def layer() -> tuple[Any, tuple[torch.Tensor, ...]]:
    packed = packed_experts(experts=EXPERTS + 1, hidden=WIDTH, width=WIDTH).bfloat16()
    inputs = routed_inputs(packed, TOKENS, PER_TOKEN, torch.bfloat16)
    answers(packed, *inputs)  # what is made and checked once
    return packed, inputs


def test_without_gradients_only_the_rows_that_are_added_are_whole(layer: Any) -> None:
    packed, inputs = layer
    with torch.no_grad(), LiveTensors() as live:
        packed(*inputs)
    # They are one unit, the output a quarter; of a slice gate_up and its activation, with intermediate results, one.
    assert live.peak_bytes < 2.6 * UNIT


def test_kept_for_the_way_back_are_the_inputs_of_the_activation_alone(layer: Any) -> None:
    packed, inputs = layer
    with LiveTensors() as live:
        output_TD = packed(*inputs)
        kept = live.live_bytes - output_TD.nbytes
    assert output_TD.requires_grad
    # Two numbers for each neuron, and where each row stands.
    assert 2 * UNIT <= kept < 2.1 * UNIT
    assert live.peak_bytes < 4.1 * UNIT


def test_on_the_way_back_a_slice_is_at_work(layer: Any) -> None:
    packed, inputs = layer
    output_TD = packed(*inputs)
    cotangent_TD = torch.ones_like(output_TD)
    with LiveTensors() as live:
        torch.autograd.grad(output_TD, (inputs[0], inputs[2]), cotangent_TD)
    assert live.peak_bytes < 3 * UNIT


def test_slices_change_no_bit_and_decode_no_expert_twice(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, inputs = layer
    decoded: list[int] = []
    real = grouped._decoded

    def counted(matrix: Any, experts: list[int], dtype: torch.dtype) -> torch.Tensor:
        decoded.extend(experts)
        return real(matrix, experts, dtype)

    monkeypatch.setattr(grouped, "_decoded", counted)
    found = answers(packed, *inputs)
    # Each expert's two matrices, there and back.
    assert sorted(decoded) == sorted(4 * list(range(EXPERTS)))
    monkeypatch.setattr(sorted_rows, "SLICE_ROWS", ROWS)
    assert all(torch.equal(*pair) for pair in zip(found, answers(packed, *inputs), strict=True))


def test_slices_equal_the_loop(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, inputs = layer
    found = answers(packed, *inputs)
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", "loop")
    for mine, theirs in zip(found, answers(packed, *inputs), strict=True):
        assert (mine.float() - theirs.float()).norm() / theirs.float().norm() < 1e-2
    assert set(execution.in_use()["experts on cpu"].split(", ")) == {
        f"{name} (by NEXUS_GPT_OSS_EXPERTS)" for name in ("grouped", "loop")
    }


def test_slices_are_of_whole_experts_and_cover_all_rows() -> None:
    experts = [0, 0, 2, 2, 2, 2, 2, 3, 5, 5]
    routing = sort_by_expert(torch.tensor(experts)[torch.randperm(10)][:, None], 7)
    slices = list(routing.slices(3))
    assert [(part.start, part.stop) for part, _ in slices] == [(0, 2), (2, 7), (7, 10)]
    assert [part.counts for _, part in slices] == [[2, 0, 0, 0, 0, 0, 0], [0, 0, 5, 0, 0, 0, 0], [0, 0, 0, 1, 0, 2, 0]]
    assert torch.cat([part.experts_R for _, part in slices]).tolist() == experts
    assert torch.equal(torch.cat([part.order_R for _, part in slices]), routing.order_R)
    assert [rows.stop for _, rows in slices[2][1].by_expert()] == [1, 3]
    assert not list(sort_by_expert(torch.zeros(0, 1, dtype=torch.long), 7).slices(3))
