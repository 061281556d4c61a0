"""Every installed family keeps the contract, on tiny random checkpoints of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_checkpoints import CONFIGS, write_family_checkpoint
from gpt_oss_checkpoints import write_tiny_checkpoint

from nexus_core.contract import CHECKS, Subject

WRITERS: dict[str, Callable[[Path], Path]] = {"gpt_oss": lambda folder: write_tiny_checkpoint(folder)} | {
    model_type: (lambda folder, model_type=model_type: write_family_checkpoint(folder, model_type))
    for model_type in CONFIGS
}


@pytest.fixture(scope="module", params=WRITERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("check", CHECKS)
def test_the_family_keeps_the_contract(base: Path, tmp_path: Path, check: str) -> None:
    CHECKS[check](Subject(base, tmp_path))


@pytest.mark.parametrize("check", ["routers", "zero_additions", "teacher", "conversion", "round_trip"])
def test_the_family_keeps_the_contract_to_the_bit_in_bfloat16(base: Path, tmp_path: Path, check: str) -> None:
    CHECKS[check](Subject(base, tmp_path, torch.bfloat16))
