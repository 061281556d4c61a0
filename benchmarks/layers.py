"""Loading and converting layers of gpt-oss-120b's real shape: peak anonymous memory must not grow with them.

Writes a random model of 3.5 GB, then one of 7 GB, into a temporary folder (TMPDIR chooses where).
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from nexus_gpt_oss import synthetic

from benchmarks.conversion import SETTINGS, first_experts, write_saliency
from benchmarks.measurement import AnonymousMemory, Measurement
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.models import load
from nexus_core.recipe.schema import Convert
from nexus_core.stages.convert import convert

LAYERS = (2, 4)

# The layers are what is measured; the real vocabulary would be as large as one of them.
VOCABULARY = 1024


def run() -> list[Measurement]:
    """Seconds relative to the fewer layers; the peak of anonymous memory beside it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = {layers: _of(layers, device) for layers in LAYERS}
    fewest, *_ = measured[LAYERS[0]]
    return [
        Measurement(
            f"{work}: layers of gpt-oss-120b",
            f"{layers} layers",
            seconds[work],
            seconds[work] / fewest[work],
            f"{LAYERS[0]} layers",
            f"{peak_bytes[work] / 1e6:,.1f} MB of anonymous memory at most, for {held_bytes / 1e9:.1f} GB of weights",
        )
        for work in fewest
        for layers, (seconds, peak_bytes, held_bytes) in measured.items()
    ]


def _of(layers: int, device: str) -> tuple[dict[str, float], dict[str, int], int]:
    """Seconds and peak bytes of each kind of work, and the bytes of the weights."""
    config = synthetic.config("120b", layers=layers)
    config |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_bytes = synthetic.write(folder / "model", config)
        checkpoint = open_checkpoint(folder / "model")
        saliency = write_saliency(folder, checkpoint.description)

        def converting(settings: Convert) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                convert(checkpoint, first_experts(checkpoint), settings, Path(out), neuron_saliency=saliency)

        work = {f"load to {device}": partial(load, checkpoint, device=device)}
        work |= {f"convert, {merge}": partial(converting, settings) for merge, settings in SETTINGS.items()}
        for kind, run in work.items():
            run()  # imports and compiles
            with AnonymousMemory() as used:
                began = time.perf_counter()
                run()
                seconds[kind] = time.perf_counter() - began
            peak_bytes[kind] = used.peak_bytes
    return seconds, peak_bytes, held_bytes
