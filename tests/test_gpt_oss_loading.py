"""Loading holds no more than one tensor of the checkpoint in host memory, however many layers there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_checkpoints import published_config, write_tiny_checkpoint
from nexus_gpt_oss import checkpoint
from nexus_gpt_oss.modeling import NexusGptOssForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core.models import load

# Prints the most anonymous memory (mapped files are the page cache's, not the program's) that loading took, in bytes.
MEASURED = """
import sys, threading
from pathlib import Path
from nexus_core.models import load
import nexus_gpt_oss.modeling

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

load(sys.argv[1], device=sys.argv[3])  # whatever is imported or started at first use
peak, done = 0, threading.Event()
before = anonymous()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2], device=sys.argv[3])
done.set()
watcher.join()
print(max(peak, anonymous()) - before)
"""


def write(folder: Path, layers: int) -> Path:
    return write_tiny_checkpoint(folder, layers=layers, experts=16, hidden=512, width=512)


def peak_bytes(small: Path, folder: Path, device: str) -> int:
    arguments = [sys.executable, "-c", MEASURED, str(small), str(folder), device]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=240).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_does_not_grow_with_layers(tmp_path: Path, device: str) -> None:
    small, large = write(tmp_path / "small", 1), write(tmp_path / "large", 9)
    config = published_config(layers=1, experts=16, hidden=512, width=512, vocab_size=128)
    layer_bytes = checkpoint.stored_bytes(config)["routed_experts"]
    # One tensor may pass through; the nine layers may not.
    assert peak_bytes(small, large, device) < 2 * layer_bytes


class Moves(TorchDispatchMode):
    """Counts, whenever a tensor is copied to another device, how many of a model's parameters are still to be."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[int] = []
        self.model: Any = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and self.model is not None:
            self.waiting.append(sum(p.device.type == "cpu" for p in self.model.parameters()))
        return function(*args, **(kwargs or {}))


def test_each_tensor_is_released_before_the_next_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_checkpoint(tmp_path / "base")
    moves = Moves()
    real = NexusGptOssForCausalLM.to

    def watched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        moves.model = self
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(NexusGptOssForCausalLM, "to", watched)
    with moves:
        model = load(folder, device="meta")
    parameters = len(list(model.parameters()))
    assert parameters > 30
    assert moves.waiting[:parameters] == list(range(parameters, 0, -1))
