"""Every backend of decoding and of packed experts against the obvious version, and how one is chosen.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter, if it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nexus_gpt_oss import decoding, execution
from nexus_gpt_oss.backends import choice, grouped, rows, sorted_rows, workspace
from nexus_gpt_oss.backends.choice import Sizes, backend_for
from nexus_gpt_oss.mxfp4 import decode
from packed_layers import answers, dense_experts, packed_experts, routed_inputs

from nexus_core.errors import UsageError

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = Sizes(experts=6, hidden_size=64, width=32)


@pytest.fixture(autouse=True)
def _choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test chooses anew, and leaves no choice behind."""
    for part in execution.PARTS:
        monkeypatch.delenv(execution.variable(part), raising=False)
    execution.forget()
    yield
    execution.forget()


@pytest.fixture
def triton() -> Any:
    """Triton, interpreting unless there is a GPU."""
    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' module is imported, so it has to stay
    return pytest.importorskip("triton")


def random_packed(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(0, 255, shape, generator=generator).to(torch.uint8)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["numba", "triton"])
def test_compiled_decoders_equal_the_table_to_the_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Choosing one compares every byte at every scale; here are shapes, rows that lie apart, and a last, partial tile.
    if name == "triton":
        request.getfixturevalue("triton")
    else:
        pytest.importorskip("numba")
    device = DEVICE if name == "triton" else CPU
    for shape in ((1,), (3, 2), (2, 5, 3), (150, 1), (70, 9)):
        blocks, scales = random_packed(*shape)
        monkeypatch.setenv("NEXUS_GPT_OSS_DECODE", "torch")
        expected = [decode(blocks, scales, dtype), decode(blocks[::2], scales[::2], dtype)]
        monkeypatch.setenv("NEXUS_GPT_OSS_DECODE", name)
        blocks, scales = blocks.to(device), scales.to(device)
        found = [decode(blocks, scales, dtype), decode(blocks[::2], scales[::2], dtype)]
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))
    assert f"{name} (by NEXUS_GPT_OSS_DECODE)" in execution.in_use()[f"decode on {device.type}"]


def test_numba_decodes_on_several_threads_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    numba_bits = pytest.importorskip("nexus_gpt_oss.decoding.numba_bits")
    monkeypatch.setattr(numba_bits, "BYTES_PER_THREAD", 64)
    blocks, scales = random_packed(101, 3)
    expected = decode(blocks, scales)
    threads = torch.get_num_threads()
    monkeypatch.setenv("NEXUS_GPT_OSS_DECODE", "numba")
    try:
        torch.set_num_threads(3)
        assert torch.equal(bits(decode(blocks, scales)), bits(expected))
    finally:
        torch.set_num_threads(threads)


def test_without_a_compiler_the_table_decodes_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding.MODULES, "numba", "no_such_module")
    blocks, scales = random_packed(128, 64)
    assert decode(blocks, scales).shape == (128, 2048)
    assert execution.in_use() == {
        "decode on cpu": "torch (not numba: nexus_gpt_oss.decoding.no_such_module is not installed)"
    }


def test_a_decoder_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    numba_bits = pytest.importorskip("nexus_gpt_oss.decoding.numba_bits")
    right = numba_bits.decode_pairs

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        arguments[2][7, 7] += 1

    monkeypatch.setattr(numba_bits, "decode_pairs", wrong)
    blocks, scales = random_packed(128, 64)
    decode(blocks, scales)
    assert execution.in_use()["decode on cpu"] == "torch (not numba: it decodes 1 of 65280 pairs wrongly)"


def test_small_tensors_are_decoded_without_a_compiler() -> None:
    decode(*random_packed(4, 2))
    assert execution.in_use() == {}


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("decode", "cuda", "NEXUS_GPT_OSS_DECODE=cuda: not one of torch, numba, triton"),
        ("experts", "dense", "NEXUS_GPT_OSS_EXPERTS=dense: not one of fused, grouped, loop"),
    ],
)
def test_an_unknown_backend_is_refused(part: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(execution.variable(part), name)
    with pytest.raises(UsageError, match=message):
        decode(*random_packed(4, 2)) if part == "decode" else backend_for(CPU, torch.float32, SIZES, 8)


def test_a_forced_backend_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding.MODULES, "numba", "no_such_module")
    monkeypatch.setenv("NEXUS_GPT_OSS_DECODE", "numba")
    with pytest.raises(UsageError, match=r"no way to do decode on cpu: numba: .* unset NEXUS_GPT_OSS_DECODE"):
        decode(*random_packed(4, 2))


@pytest.mark.parametrize("tokens", [1, 80])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("grouped", torch.float64, 1e-13),
        ("grouped", torch.float32, 2e-6),
        ("grouped", torch.bfloat16, 1e-2),
        ("fused", torch.float32, 2e-6),
        ("fused", torch.bfloat16, 4e-2),  # Triton's interpreter cuts bfloat16 off where a GPU rounds
    ],
)
def test_backends_equal_the_dense_experts(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if name == "fused":
        request.getfixturevalue("triton")
        if DEVICE.type == "cuda" and dtype != torch.bfloat16:
            pytest.skip("on a GPU it multiplies bfloat16 only")
    device = DEVICE if name == "fused" else CPU
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", name)
    monkeypatch.setattr(grouped, "buffer_bytes", lambda: 3 * 64 * 64 * dtype.itemsize)  # three experts at a time
    packed = packed_experts(hidden=64, width=96).to(dtype)
    inputs = routed_inputs(packed, tokens, 3, dtype)
    # The dense version in float64: the error is the backend's own.
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (inputs[0], inputs[2])]
    expected = answers(dense_experts(packed, torch.float64), exact[0], inputs[1], exact[1])
    moved = [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in inputs]
    found = answers(packed.to(device), *moved)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.cpu().double() - theirs).norm() / theirs.norm() < tolerance
    assert execution.in_use()[f"experts on {device.type}"].startswith(name)


@pytest.mark.parametrize("multiply", [grouped.multiply_by_torch, grouped.multiply_in_turn])
def test_grouped_products_equal_one_after_the_other(multiply: grouped.GroupedProduct) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((9, 32), generator=generator).bfloat16()
    matrices = torch.randn((3, 32, 16), generator=generator).bfloat16()
    bias = torch.randn((9, 16), generator=generator).bfloat16()
    expected = torch.cat([rows[:2] @ matrices[0], rows[2:8] @ matrices[1], rows[8:] @ matrices[2]])
    for added in (None, bias):
        out = torch.empty(9, 16, dtype=torch.bfloat16)
        multiply(rows, matrices, [2, 8, 9], added, out)
        torch.testing.assert_close(out, expected if added is None else expected + bias)


def test_torch_takes_grouped_products_of_the_real_layouts() -> None:
    # What a GPU's kernel demands of types, strides and alignment, torch checks of tensors without numbers too.
    def multiply(rows: int, hidden: int, width: int) -> None:
        gate_up = torch.empty(3, 2 * width, hidden, dtype=torch.bfloat16, device="meta")
        rows_RI, out_RO = (gate_up.new_empty(rows, size) for size in (hidden, 2 * width))
        stops = [1, rows - 2, rows]
        grouped.multiply_by_torch(rows_RI, gate_up.transpose(1, 2), stops, torch.empty_like(out_RO), out_RO)
        grouped.multiply_by_torch(out_RO, gate_up, stops, None, rows_RI)

    multiply(rows=300, hidden=2880, width=2880)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        multiply(rows=300, hidden=36, width=32)


def test_on_a_gpu_float32_is_grouped() -> None:
    gpu = torch.device("cuda")
    assert list(choice._variants("grouped", gpu, torch.float32, True)) == ["grouped", "grouped in turn"]
    (fused,) = choice._variants("fused", gpu, torch.float32, True).values()
    with pytest.raises(execution.Unavailable, match=r"multiplies bfloat16 on a GPU, not torch\.float32"):
        fused()


def test_grouped_never_holds_more_than_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = workspace.workspace

    def watched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append(torch.Size(shape).numel() * dtype.itemsize)
        return real(shape, dtype, device)

    monkeypatch.setattr(grouped, "workspace", watched)
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", "grouped")
    monkeypatch.setattr(grouped, "buffer_bytes", lambda: 20000)
    packed = packed_experts(experts=20, hidden=64, width=32).bfloat16()
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 64, 4, torch.bfloat16)
    execution.forget()
    backend_for(CPU, torch.bfloat16, Sizes(20, 64, 32), 256)
    asked.clear()  # of the check
    answers(packed, hidden_TD, indices_TK, weights_TK)
    # 8 KB an expert of gate_up, 4 KB of down: two and four at a time of the nineteen that are chosen, there and back.
    assert max(asked) == 16384
    assert len(asked) == 2 * (10 + 5)


@pytest.mark.parametrize("given", ["0", "-3", "much"])
def test_a_buffer_of_no_size_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_GPT_OSS_DECODED_MB", given)
    with pytest.raises(UsageError, match=f"NEXUS_GPT_OSS_DECODED_MB={given}: not a positive number"):
        grouped.buffer_bytes()


@pytest.mark.parametrize("name", ["loop", "grouped", "fused"])
def test_rows_in_pieces_give_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name == "fused":
        request.getfixturevalue("triton")
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", name)
    device = DEVICE if name == "fused" else CPU
    packed = packed_experts().bfloat16()
    given = routed_inputs(packed, 80, 2, torch.bfloat16)
    inputs = [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in given]
    packed.to(device)
    whole = answers(packed, *inputs)
    monkeypatch.setattr(rows, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(sorted_rows, "SLICE_ROWS", 40)
    assert len(rows.pieces(80)) == 12
    assert all(torch.equal(*pair) for pair in zip(answers(packed, *inputs), whole, strict=True))


def test_on_a_cpu_the_loop_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_experts()
    answers(packed, *routed_inputs(packed, 4, 2, torch.float32))
    assert execution.in_use() == {"experts on cpu": "loop"}
    execution.forget()
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", "grouped")
    answers(packed, *routed_inputs(packed, 4, 2, torch.float32))
    assert execution.in_use() == {"experts on cpu": "grouped (by NEXUS_GPT_OSS_EXPERTS)"}


def test_a_backend_that_is_wrong_is_refused() -> None:
    class Wrong(choice.LoopBackend):
        name = "wrong"

        def backward(self, *arguments: Any) -> rows.Gradients:
            right = super().backward(*arguments)
            return rows.Gradients(right.hidden_TD * 1.1, right.weights_TK)

    with pytest.raises(execution.Unavailable, match=r"is off by 0\.1 from the loop"):
        choice.checked(Wrong(), CPU, torch.float32)


def test_decoding_memory_is_used_again() -> None:
    first = workspace.workspace((4, 8), torch.bfloat16, CPU)
    assert workspace.workspace((2, 8), torch.bfloat16, CPU).data_ptr() == first.data_ptr()
    with torch.inference_mode():
        assert not workspace.workspace((64, 64), torch.float32, CPU).is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loop", "grouped", "fused", None])
@pytest.mark.parametrize("count", [1, 40, 512])
def test_a_gpu_backend_equals_the_cpu_at_real_widths(
    name: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name:
        monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", name)
    sizes = Sizes(4, 2880, 2880)
    problem = choice._problem(torch.device("cuda"), torch.bfloat16, sizes, [count, 0, 2 * count + 1, count])
    backend = backend_for(torch.device("cuda"), torch.bfloat16, sizes, 4 * count + 1)
    found, again = (choice._answers(backend, *problem) for _ in range(2))
    experts, routing, hidden_TD, weights_TK = problem
    exact = choice._answers(choice.LoopBackend(), experts, routing, hidden_TD.float(), weights_TK.float())
    for mine, repeated, theirs in zip(found, again, exact, strict=True):
        assert (mine.float() - theirs).norm() / theirs.norm() < 1e-2
        assert name == "loop" or torch.equal(mine, repeated)


@pytest.mark.gpu
def test_deterministic_algorithms_leave_nothing_to_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        backend = backend_for(torch.device("cuda"), torch.bfloat16, Sizes(4, 64, 32), 100)
    finally:
        torch.use_deterministic_algorithms(False)
    assert backend.name == "grouped"
    assert execution.in_use()["experts on cuda"] == "grouped"
