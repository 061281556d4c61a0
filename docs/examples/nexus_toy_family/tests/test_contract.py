"""What every family promises NEXUS, checked on a tiny random checkpoint.

On a real one: `pytest --nexus-contract FOLDER`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from nexus_core.contract import CHECKS, Subject

from nexus_toy_moe.tiny import write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("promise", CHECKS)
def test_contract(promise: str, checkpoint: Path, tmp_path: Path) -> None:
    CHECKS[promise](Subject(checkpoint, tmp_path))
