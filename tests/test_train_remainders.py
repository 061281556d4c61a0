"""A float32 number as a bfloat16 and 16 bits more: joined again to the bit, whatever the number."""

from __future__ import annotations

import pytest
import torch

from nexus_core.train.remainders import join, split

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    """Float32 numbers of these bits, given as int64 from 0 to 2**32."""
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def special_numbers() -> torch.Tensor:
    """Every upper half, with lower halves at and around what rounds up, down, and lies between."""
    lower = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])
    return of_bits((torch.arange(2**16)[:, None] * 2**16 + lower).flatten())


def random_numbers() -> torch.Tensor:
    return of_bits(torch.randint(2**32, (2**20,), generator=torch.Generator().manual_seed(0)))


def split_of(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rounded, remainders = torch.empty_like(numbers, dtype=torch.bfloat16), torch.empty_like(numbers, dtype=torch.int16)
    split(numbers.clone(), rounded, remainders)
    return rounded, remainders


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numbers", [special_numbers, random_numbers])
def test_finite_numbers_are_joined_again_to_the_bit(numbers, device) -> None:
    given = numbers().to(device)
    joined = join(*split_of(given))
    finite = given.isfinite()
    assert torch.equal(joined.view(torch.int32)[finite], given.view(torch.int32)[finite])
    # among them what is too large for bfloat16, and numbers below the smallest normal one
    assert finite.sum() > 0.9 * len(given)


@pytest.mark.parametrize("device", DEVICES)
def test_rounds_to_nearest_and_halves_away_from_zero(device) -> None:
    given = special_numbers().to(device)
    finite, is_half = given.isfinite(), (given.view(torch.int32) & 0xFFFF) == 0x8000
    rounded, _ = split_of(given)
    assert torch.equal(rounded[finite & ~is_half], given[finite & ~is_half].bfloat16())
    away = of_bits((given.view(torch.int32).long() & 0xFFFF0000) + 0x10000).bfloat16()
    assert torch.equal(rounded[finite & is_half], away[finite & is_half])


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_is_nan_in_the_parameter_and_joined(device) -> None:
    given = special_numbers().to(device)
    rounded, remainders = split_of(given)
    lost = ~given.isfinite()
    assert rounded[lost].isnan().all()
    assert join(rounded, remainders)[lost].isnan().all()


def test_a_number_too_large_for_bfloat16_is_infinite_in_the_parameter_only() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max])
    rounded, remainders = split_of(largest)
    assert rounded.isposinf().all()
    assert torch.equal(join(rounded, remainders), largest)
