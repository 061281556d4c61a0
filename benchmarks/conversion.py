"""Converting one layer of gpt-oss-120b's real shape: against reading and writing the bytes, and dequantizing it all.

Writes a random layer of 1.7 GB into a temporary folder (TMPDIR chooses where).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nexus_gpt_oss import synthetic

from benchmarks.measurement import AnonymousMemory, Measurement, interleaved
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.recipe.schema import Convert
from nexus_core.select.selection import LayerSelection, Selection
from nexus_core.stages.convert import convert
from nexus_core.statistics.saliency import FILE_NAME as SALIENCY_NAME
from nexus_core.statistics.saliency import NeuronSaliency
from nexus_core.types import MoeDescription

CHOSEN = 24
ROUNDS = 3

# Dequantizing all 128 experts takes about 19 GB; these many are measured and multiplied.
DEQUANTIZED = 16

# What the published recipe does, and what the others do.
SETTINGS = {
    "mean": Convert(),
    "neurons of the selected experts": Convert(merge="neurons", pool="selected"),
}

# The embeddings play no part in converting, so the random model has few words and most of its bytes are the layer.
VOCABULARY = 1024


def run() -> list[Measurement]:
    """Time relative to a warm read of the chosen experts' bytes plus a write of the result's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.write(folder / "base", synthetic.config("120b", layers=1) | {"vocab_size": VOCABULARY})
        checkpoint = open_checkpoint(folder / "base")
        outputs = (folder / f"converted_{number}" for number in itertools.count())
        saliency = write_saliency(folder, checkpoint.description)

        def converting(settings: Convert) -> Callable[[], None]:
            def nexus() -> None:
                out = next(outputs)
                out.mkdir()
                convert(checkpoint, first_experts(checkpoint), settings, out, neuron_saliency=saliency)

            return nexus

        subjects = {f"nexus, {name}": converting(settings) for name, settings in SETTINGS.items()}
        # First of all: what an earlier run has freed and the allocator kept would not be seen.
        memory = {}
        for name, nexus in subjects.items():
            with AnonymousMemory() as measured:
                nexus()
            memory[name] = measured.peak_bytes
        floor_alone = {"floor": lambda: _read_and_write(checkpoint, folder / "floor")}
        seconds = interleaved(floor_alone | subjects, rounds=ROUNDS)
        with AnonymousMemory() as dense_memory:
            began = time.perf_counter()
            _dequantize_and_average(checkpoint)
            dense_seconds = time.perf_counter() - began
        times = checkpoint.description.experts / DEQUANTIZED

    benchmark = f"convert one 120b layer, {CHOSEN} of 128 experts"
    floor = "warm read of the chosen bytes + write"

    def row(subject: str, value: float, note: str = "") -> Measurement:
        return Measurement(benchmark, subject, value, value / seconds["floor"], floor, note)

    return [
        row(floor, seconds["floor"]),
        *(row(name, seconds[name], f"{peak / 1e6:,.0f} MB above imports") for name, peak in memory.items()),
        row(
            "dequantize the layer, average (transformers)",
            times * dense_seconds,
            f"{times * dense_memory.peak_bytes / 1e6:,.0f} MB; {DEQUANTIZED} experts, one run, x {times:.0f}",
        ),
    ]


def first_experts(checkpoint: Checkpoint) -> Selection:
    """The same experts of every layer; which ones makes no difference to what it costs."""
    experts = checkpoint.description.experts
    layers = tuple(
        LayerSelection(
            layer=layer,
            experts=tuple(range(CHOSEN)),
            importance=(1 / experts,) * experts,
            explained_variance=(),
            top_share={"4": 4 / experts},
            pattern="even",
            recommended_top_k=CHOSEN,
        )
        for layer in checkpoint.description.layers
    )
    return Selection(strategy="pca", top_k=CHOSEN, layers=layers)


def write_saliency(folder: Path, moe: MoeDescription) -> Path:
    """Of neurons that differ as much as real ones: a few matter many times as much as the median."""
    saliency = NeuronSaliency.zeros(moe.layers, ["domain"], moe.experts, moe.expert_width)
    saliency.tokens += 1
    torch.manual_seed(0)
    saliency.activity.log_normal_()
    saliency.output_norm.log_normal_()
    saliency.save(folder / SALIENCY_NAME, {})
    return folder / SALIENCY_NAME


def _read_and_write(checkpoint: Checkpoint, scratch: Path) -> None:
    """The least any converter must do: the chosen experts' slices in, a shared expert's bytes out."""
    for location in checkpoint.family.hook.nexus_enumerate_experts(config=checkpoint.config)[:CHOSEN]:
        for part in location.parts:
            checkpoint.reader.read(part.name, part.index)
    moe = checkpoint.description
    scratch.write_bytes(bytes(3 * 2 * moe.hidden_size * moe.expert_width))


def _dequantize_and_average(checkpoint: Checkpoint) -> None:
    """What loading through transformers does on a machine without its GPU kernel: experts dense, then the mean."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for projection in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{projection}"
        blocks, scales = (
            torch.stack([checkpoint.reader.read(f"{name}_{part}", expert) for expert in range(DEQUANTIZED)])
            for part in ("blocks", "scales")
        )
        dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        # In float32, as many as are chosen of all.
        dense[: DEQUANTIZED * CHOSEN // 128].float().mean(dim=0)
