"""MXFP4 against known answers and a version slow enough to be obvious."""

from __future__ import annotations

import pytest
import torch
from nexus_gpt_oss.mxfp4 import decode, encode

from nexus_core.errors import ShapeError

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def obvious_decode(blocks: torch.Tensor, scales: torch.Tensor) -> list[list[float]]:
    """Number by number in Python's float64, where all products are exact; one list per group."""
    groups = []
    for group, scale in zip(blocks.reshape(-1, 16).tolist(), scales.reshape(-1).tolist(), strict=True):
        numbers = []
        for byte in group:
            for nibble in (byte & 15, byte >> 4):
                sign = -1.0 if nibble & 8 else 1.0
                numbers.append(sign * MAGNITUDES[nibble & 7] * 2.0 ** (scale - 127))
        groups.append(numbers)
    return groups


def every_byte_and_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (256, 16, 16) and scales (256, 16): row s holds all bytes at scale s."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)
    return blocks.contiguous(), torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()


def random_packed(*shape: int, scales: tuple[int, int] = (0, 253)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*scales, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scale", "factor"), [(127, 1.0), (126, 0.5), (130, 8.0)])
def test_known_answer(dtype: torch.dtype, scale: int, factor: float) -> None:
    blocks = torch.tensor(list(bytes.fromhex("1032547698badcfe") * 2), dtype=torch.uint8).view(1, 16)
    expected = [factor * value for value in (*MAGNITUDES, *(-value for value in MAGNITUDES))] * 2
    decoded = decode(blocks, torch.tensor([scale], dtype=torch.uint8), dtype)
    assert decoded.tolist() == expected
    assert torch.signbit(decoded).tolist() == [value < 0 or index % 16 == 8 for index, value in enumerate(expected)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_at_every_scale_is_exact(dtype: torch.dtype) -> None:
    blocks, scales = (tensor[:255] for tensor in every_byte_and_scale())
    # Beyond the largest float32, 2**128, both types have infinity, as the reference's multiplication gives.
    expected = torch.tensor(obvious_decode(blocks, scales), dtype=torch.float64).to(dtype)
    decoded = decode(blocks, scales, dtype).view(expected.shape)
    assert torch.equal(decoded.view(INTEGERS[dtype]), expected.view(INTEGERS[dtype]))
    assert torch.isinf(decoded).any()
    assert (decoded.abs() == 2.0**-128).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scale_255_is_not_a_number(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    assert decode(blocks[255], scales[255], dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 5, 3), (700, 90), (0, 4)])
def test_shapes_tiles_and_reused_output(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    blocks, scales = random_packed(*shape)
    decoded = decode(blocks, scales, dtype)
    assert decoded.shape == (*shape[:-1], 32 * shape[-1])
    if decoded.numel():
        sample = slice(-50, None)  # the last rows lie in the last, shorter tile
        expected = obvious_decode(blocks.view(-1, 16)[sample], scales.view(-1)[sample])
        assert decoded.view(-1, 32)[sample].tolist() == expected
    out = torch.full_like(decoded, torch.nan)
    assert decode(blocks, scales, dtype, out=out) is out
    assert torch.equal(out, decoded)


def test_slices_that_are_not_contiguous_decode_alike() -> None:
    blocks, scales = random_packed(6, 4)
    assert torch.equal(decode(blocks[::2], scales[::2]), decode(blocks, scales)[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_decoded_encodes_to_the_same_values(dtype: torch.dtype) -> None:
    decoded = decode(*random_packed(64, 40), dtype)
    again = decode(*encode(decoded), dtype)
    assert torch.equal(again, decoded)
    assert torch.equal(torch.signbit(again), torch.signbit(decoded))


def test_zeros_encode_to_zeros() -> None:
    assert not decode(*encode(torch.zeros(2, 64))).any()


def test_ties_go_to_the_even_mantissa() -> None:
    # The 4 fixes the scale at 127: it is exact there, and so are all values but the ties.
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5])
    group = torch.cat((ties, -ties, torch.full((20,), 4.0)))
    blocks, scales = encode(group)
    assert scales.tolist() == [127]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0]
    assert decode(blocks, scales, torch.float32)[:12].tolist() == expected + [-value for value in expected]


def test_largest_number_between_6_and_8_takes_the_better_scale() -> None:
    # Alone, 7.9 saturates to 6 at the specification's scale and rounds to 8 at the next.
    alone = torch.zeros(32)
    alone[3] = 7.9
    assert decode(*encode(alone), torch.float32)[3] == 8.0
    # Beside many numbers that only the finer scale can tell apart, 6.5 had better saturate.
    crowd = torch.full((32,), 0.5)
    crowd[3] = 6.5
    decoded = decode(*encode(crowd), torch.float32)
    assert decoded[3] == 6.0
    assert (decoded[:3] == 0.5).all()


@pytest.mark.parametrize("exponent", [-149, -140, -127, -60, 0, 60, 127])
def test_encoding_is_the_best_of_both_scales_at_any_magnitude(exponent: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = (torch.rand((20, 32), generator=generator, dtype=torch.float64) - 0.5) * 2.0**exponent
    weights = weights.float()
    encoded, scales = encode(weights)
    decoded = decode(encoded, scales, torch.float32).double()
    for row in range(20):
        magnitude = weights[row].double().abs().max()
        if magnitude == 0:
            assert not decoded[row].any()
            continue
        power = max(int(torch.floor(torch.log2(magnitude))) - 2, -127)
        errors = []
        for candidate in (power, power + 1):
            grid = torch.tensor(MAGNITUDES, dtype=torch.float64) * 2.0**candidate
            distances = (weights[row].double().abs()[:, None] - grid).abs().amin(dim=-1)
            errors.append(float(distances.square().sum()))
        error = float((weights[row].double() - decoded[row]).square().sum())
        assert error == pytest.approx(min(errors), rel=1e-5, abs=0.0)


def test_encoding_bfloat16_equals_encoding_its_float32() -> None:
    weights = torch.randn((4, 96), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(encode(weights), encode(weights.float()), strict=True))


@pytest.mark.parametrize(
    ("blocks", "scales", "dtype", "message"),
    [
        (
            torch.zeros(2, 3, 15, dtype=torch.uint8),
            torch.zeros(2, 3, dtype=torch.uint8),
            torch.float32,
            r"\[2, 3, 15\]",
        ),
        (torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8), torch.float32, r"\[3, 2\]"),
        (torch.zeros(3, 16), torch.zeros(3, dtype=torch.uint8), torch.float32, "uint8, not torch.float32"),
        (torch.zeros(3, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), torch.float16, "not torch.float16"),
    ],
)
def test_decode_refuses(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        decode(blocks, scales, dtype)


def test_decode_refuses_an_output_that_does_not_fit() -> None:
    blocks, scales = random_packed(2, 2)
    with pytest.raises(ShapeError, match=r"\[2, 64\] torch.bfloat16, not \[2, 32\]"):
        decode(blocks, scales, out=torch.empty(2, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(4, 33), r"\[4, 33\]"),
        (torch.zeros(4, 32, dtype=torch.float64), "float64"),
        (torch.full((1, 32), torch.inf), "not finite"),
    ],
)
def test_encode_refuses(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        encode(weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_decodes_and_encodes_to_the_same_bits(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    decoded = decode(blocks, scales, dtype)
    on_gpu = decode(blocks.cuda(), scales.cuda(), dtype).cpu()
    assert torch.equal(on_gpu.view(INTEGERS[dtype]), decoded.view(INTEGERS[dtype]))
    weights = torch.randn((40, 96), generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, packed_on_gpu = encode(weights), encode(weights.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(packed, packed_on_gpu, strict=True))
