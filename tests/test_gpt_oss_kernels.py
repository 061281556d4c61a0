"""Every Triton kernel compiles for the GPUs it is meant for, whether one is there or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# Bytes of shared memory that a block may have, by the CUDA C++ Programming Guide: A100; RTX 4090, L40S; H100, H200.
@pytest.mark.parametrize(("capability", "shared_bytes"), [(80, 163 << 10), (89, 99 << 10), (90, 227 << 10)])
def test_every_kernel_compiles_for_gpus_that_need_not_be_there(capability: int, shared_bytes: int) -> None:
    pytest.importorskip("triton")
    # In a process of its own, since this one may have imported the kernels for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("kernels_script.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 12
    for name, kernel in kernels.items():
        assert kernel["shared_bytes"] <= shared_bytes, name
        # A few bytes are nothing; kilobytes, as float32 sums of these tiles need, make a kernel ten times slower.
        assert kernel["spilled_bytes"] <= 64, name
