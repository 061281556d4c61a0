"""`nexus` called as from a shell, in this process."""

from __future__ import annotations

import pytest

from nexus_core.cli import main


def call(*arguments: object) -> int:
    """Exit code of `nexus ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code
