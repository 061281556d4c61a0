"""A tiny base, statistics of it, and conversions of it, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from safetensors.torch import save_file

from nexus_core.additions import SharedExpert
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.recipe.schema import Convert
from nexus_core.select import LayerSelection, Selection
from nexus_core.stages.convert import MOE_INPUTS_NAME, SALIENCY_NAME, convert
from nexus_core.statistics.saliency import NeuronSaliency

LAYERS, EXPERTS, HIDDEN = 2, 8, 64
CHOSEN = {0: (5, 2, 7), 1: (0, 3)}
IMPORTANCE = (0.05, 0.05, 0.2, 0.15, 0.1, 0.2, 0.1, 0.15)


def write_base(folder: Path) -> Checkpoint:
    """A tiny random base with everything that comes along with a model."""
    write_tiny_checkpoint(folder, layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, vocabulary=300, tokenizer=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return open_checkpoint(folder)


def write_statistics(folder: Path) -> Path:
    """What collect would leave: random inputs and outputs of the layers, and random saliency on two sets."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in ("inputs", "outputs")]
    save_file({name: torch.randn(40, HIDDEN, generator=generator) for name in names}, folder / MOE_INPUTS_NAME)
    saliency = NeuronSaliency.zeros(range(LAYERS), ["domain", "general"], EXPERTS, 32)
    for tensor in (saliency.activity, saliency.output_norm):
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    saliency.tokens += 100
    saliency.save(folder / SALIENCY_NAME, {})
    return folder


def selection(chosen: dict[int, tuple[int, ...]] = CHOSEN) -> Selection:
    layers = tuple(
        LayerSelection(layer=layer, experts=experts, importance=IMPORTANCE) for layer, experts in chosen.items()
    )
    return Selection(strategy="pca", top_k="auto", layers=layers)


def converted(
    base: Checkpoint,
    out: Path,
    *,
    moe_inputs: Path | None = None,
    statistics: Path | None = None,
    learn: Sequence[str] | None = ("domain",),
    **settings: object,
) -> Checkpoint:
    """statistics: a folder with moe inputs and neuron saliency."""
    out.mkdir(parents=True)
    found = {path.name: path for path in statistics.iterdir()} if statistics else {}
    convert(
        base,
        selection(),
        Convert(**settings),
        out,
        moe_inputs=moe_inputs or found.get(MOE_INPUTS_NAME),
        neuron_saliency=found.get(SALIENCY_NAME),
        learn=learn,
    )
    return open_checkpoint(out)


def report_of(checkpoint: Checkpoint) -> dict:
    return json.loads((checkpoint.folder / "convert_report.json").read_text())


def shared_experts(model: torch.nn.Module) -> list[SharedExpert]:
    return [module for module in model.modules() if isinstance(module, SharedExpert)]
