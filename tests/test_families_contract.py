"""Every installed family keeps the contract, on tiny random checkpoints of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_checkpoints import WRITERS

from nexus_core.contract import CHECKS, Subject, check_fresh_processes
from nexus_core.plugins import installed


@pytest.fixture(scope="module", params=WRITERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("check", sorted(CHECKS.keys() - {"fresh_process"}))
def test_the_family_keeps_the_contract(base: Path, tmp_path: Path, check: str) -> None:
    CHECKS[check](Subject(base, tmp_path))


@pytest.mark.parametrize("check", ["routers", "zero_additions", "teacher", "conversion", "round_trip"])
def test_the_family_keeps_the_contract_to_the_bit_in_bfloat16(base: Path, tmp_path: Path, check: str) -> None:
    CHECKS[check](Subject(base, tmp_path, torch.bfloat16))


def test_a_fresh_process_loads_converted_checkpoints_of_all_families(tmp_path: Path) -> None:
    bases = {name: write(tmp_path / name) for name, write in WRITERS.items()}
    check_fresh_processes([Subject(base, tmp_path / "work" / name) for name, base in bases.items()])


def test_no_installed_family_goes_untested(tmp_path: Path) -> None:
    tested = {Subject(write(tmp_path / name), tmp_path).checkpoint.family.name for name, write in WRITERS.items()}
    answers = {plugin.plugin_name for plugin in installed().hook.nexus_claims.get_hookimpls()}
    assert tested == answers
