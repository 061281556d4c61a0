"""A family's tensors on disk: which experts' there must be, their names beside transformers', and their bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.initialization import no_init_weights

from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.families.extended import ExtendedModel, extended_classes
from nexus_core.families.layout import Fused, Layout, layer_prefix, number_type
from nexus_core.families.rules import Config
from nexus_core.families.strict import refuse


def conversions(layout: Layout) -> list[WeightConverter | WeightRenaming]:
    """How transformers turns the names and tensors on disk into those in memory, and back when it saves.

    Only experts, router and the layout's `stored_names` are named: everything else, NEXUS's additions too, is called
    the same in both places.
    """
    in_memory, stored = f"{layout.block}.experts", layout.stored_experts
    found: list[WeightConverter | WeightRenaming] = []
    for suffix in ("", *layout.matrix_suffixes):
        gate_up, down = f"{in_memory}.gate_up_proj{suffix}", f"{in_memory}.down_proj{suffix}"
        if isinstance(stored, Fused):
            names = ((stored.gate_up + suffix, gate_up), (stored.down + suffix, down))
            found += [WeightRenaming(_pattern(source), target) for source, target in names if source != target]
        else:
            parts = [_pattern(name + suffix) for name in (stored.gate, stored.up, stored.down)]
            found.append(WeightConverter(parts[:2], gate_up, [MergeModulelist(dim=0), Concatenate(dim=1)]))
            found.append(WeightConverter(parts[2:], down, [MergeModulelist(dim=0)]))
    router = f"{layout.block}.{layout.router}.weight"
    if layout.stored_router != router:
        found.append(WeightRenaming(_pattern(layout.stored_router), router))
    found += [WeightRenaming(_pattern(stored), name) for name, stored in layout.stored_names.items()]
    return found


def _pattern(name: str) -> str:
    # transformers' own sign for an index, and dots that mean dots.
    return name.replace("{expert}", "*").replace(".", r"\.").replace(r"*\.", "*.")


def check_tensors(layout: Layout, folder: Path, config: Config) -> None:
    """Raise CheckpointError by name if a routed expert's tensor is missing, or there are some of an expert too many.

    And for whatever else the layout sees in the headers.

    transformers would stack what it finds, and tell only that the stack has another shape.
    """
    entries = CheckpointReader(folder).entries
    expected = {part.name for location in layout.locations(config) for part in location.parts}
    missing = sorted(expected - entries.keys())
    marks = {name.split("{expert}")[0] for name in vars(layout.stored_experts).values()}
    beginnings = tuple(layer_prefix(layer) + mark for layer in layout.describe(config).layers for mark in marks)
    unknown = sorted(name for name in entries.keys() - expected if name.startswith(beginnings))
    refuse(str(folder), missing, unknown, [])
    layout.check(entries, folder)


def stored_bytes(layout: Layout, config: Config) -> dict[str, int]:
    """Bytes by part, from an empty model that transformers builds of the config: exactly the tensors on disk.

    Parts: routed_experts, router, shared_experts (the base's own and NEXUS's), dense_layers (feed-forward blocks
    without experts, if there are any), attention (with the norms of its layer), embeddings (with head and last norm).
    """
    classes = extended_classes(layout)
    with torch.device("meta"), no_init_weights():
        model = classes.causal_lm(classes.config.from_dict(dict(config)))
    number = getattr(torch, number_type(config))
    exact = tuple(model._keep_in_fp32_modules_strict)
    parts: Counter[str] = Counter(routed_experts=0, router=0, attention=0, embeddings=0, shared_experts=0)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        # Built in float32, which stands for the checkpoint's own type unless the tensor is never rounded.
        is_rounded = tensor.dtype == torch.float32 and not any(part in name for part in exact)
        parts[_part(layout, model, name)] += tensor.numel() * (number if is_rounded else tensor.dtype).itemsize
    return dict(parts)


def _part(layout: Layout, model: ExtendedModel, name: str) -> str:
    if not name.startswith("model.layers."):
        return "embeddings"
    layer, _, inside = name.removeprefix("model.layers.").partition(".")
    if not inside.startswith(f"{layout.block}."):
        return "attention"
    if int(layer) not in layout.describe(model.config.to_dict()).layers:
        return "dense_layers"
    inside = inside.removeprefix(f"{layout.block}.")
    for module, part in (("experts.", "routed_experts"), (f"{layout.router}.", "router")):
        if inside.startswith(module):
            return part
    return "shared_experts"
