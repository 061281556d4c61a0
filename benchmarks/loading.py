"""Loading layers of gpt-oss-120b's real shape: peak anonymous memory must not grow with them.

Writes a random model of 3.5 GB, then one of 7 GB, into a temporary folder (TMPDIR chooses where).
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

import torch
from nexus_gpt_oss import synthetic

from benchmarks.measurement import AnonymousMemory, Measurement
from nexus_core.models import load

LAYERS = (2, 4)

# The layers are what is measured; the real vocabulary would be as large as one of them.
VOCABULARY = 1024


def run() -> list[Measurement]:
    """Seconds relative to the fewer layers; the peak of anonymous memory beside it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = [_of(layers, device) for layers in LAYERS]
    against = f"{LAYERS[0]} layers"
    return [
        Measurement(
            f"load layers of gpt-oss-120b to {device}",
            f"{layers} layers",
            seconds,
            seconds / measured[0][0],
            against,
            f"{peak_bytes / 1e6:,.1f} MB of anonymous memory at most, for {held_bytes / 1e9:.1f} GB of weights",
        )
        for layers, (seconds, peak_bytes, held_bytes) in zip(LAYERS, measured, strict=True)
    ]


def _of(layers: int, device: str) -> tuple[float, int, int]:
    config = synthetic.config("120b", layers=layers)
    config |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    with tempfile.TemporaryDirectory() as name:
        held_bytes = synthetic.write(Path(name) / "model", config)
        load(Path(name) / "model", device="meta")  # what is imported at first use
        gc.collect()
        with AnonymousMemory() as used:
            began = time.perf_counter()
            model = load(Path(name) / "model", device=device)
            seconds = time.perf_counter() - began
        del model
    return seconds, used.peak_bytes, held_bytes
