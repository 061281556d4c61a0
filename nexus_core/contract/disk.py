"""What a family says of a checkpoint on disk is what lies there, and a damaged one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nexus_core.checkpoint.links import link_shards
from nexus_core.checkpoint.reader import read_header
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.checkpoint.writer import write_index, write_json, write_shard
from nexus_core.contract.subject import BrokenContract, Subject, require
from nexus_core.errors import CheckpointError
from nexus_core.models import ignored_tensors

UNKNOWN_TENSOR = "model.layers.0.of_no_family.weight"


def check_claims(subject: Subject) -> None:
    """The converted checkpoint has a model type of its own, and the same family claims it."""
    converted = open_checkpoint(subject.converted())
    owner, found = subject.checkpoint.family.name, converted.family.name
    require(found == owner, f"nexus_claims: '{found}' instead of '{owner}' claims the converted checkpoint")
    types = [checkpoint.config.get("model_type") for checkpoint in (subject.checkpoint, converted)]
    require(types[0] != types[1], f"nexus_converted_config: keeps model_type '{types[0]}', which transformers owns")
    width, expected = converted.description.shared_expert_width, subject.checkpoint.description.expert_width
    require(width == expected, f"nexus_describe_moe: a shared expert of width {expected} is described as {width}")


def check_locations(subject: Subject) -> None:
    """The description and the experts' locations agree with the headers on disk, tensor by tensor."""
    moe, entries = subject.checkpoint.description, subject.checkpoint.reader.entries
    require(list(moe.layers) == sorted(set(moe.layers)), f"nexus_describe_moe: layers {moe.layers} are not ascending")
    require(0 < moe.experts_per_token <= moe.experts, "nexus_describe_moe: more experts per token than experts")
    locations = subject.hook.nexus_enumerate_experts(config=subject.checkpoint.config)
    expected = [(layer, expert) for layer in moe.layers for expert in range(moe.experts)]
    found = [(location.layer, location.expert) for location in locations]
    require(found == expected, "nexus_enumerate_experts: must go by layer, then expert, all of them once")
    parts = [part for location in locations for part in location.parts]
    require(len(set(parts)) == len(parts), "nexus_enumerate_experts: two experts share a part")
    for part in parts:
        require(part.name in entries, f"nexus_enumerate_experts: tensor '{part.name}' is in no shard")
        stacked = entries[part.name].shape[0]
        require(
            part.index is None or stacked == moe.experts,
            f"nexus_enumerate_experts: '{part.name}' has {stacked} slices for {moe.experts} experts",
        )


def check_stored_bytes(subject: Subject) -> None:
    """The bytes told from the config are those on disk, of the experts and of everything, before and after.

    Not counted are tensors that the model's class leaves unread, such as layers for predicting several tokens.
    """
    for folder in (subject.folder, subject.converted()):
        checkpoint = open_checkpoint(folder)
        told = subject.hook.nexus_stored_bytes(config=checkpoint.config)
        entries = checkpoint.reader.entries
        ignored = ignored_tensors(subject.model(), entries)
        on_disk = sum(entry.stored_bytes for name, entry in entries.items() if name not in ignored)
        require(sum(told.values()) == on_disk, f"nexus_stored_bytes: {sum(told.values())} instead of {on_disk}: {told}")
        locations = subject.hook.nexus_enumerate_experts(config=checkpoint.config)
        names = {part.name for location in locations for part in location.parts}
        experts = sum(entries[name].stored_bytes for name in names)
        require(
            told["routed_experts"] == experts, f"nexus_stored_bytes: routed_experts are {experts}, not as in {told}"
        )


def check_refusals(subject: Subject) -> None:
    """A checkpoint that lacks a tensor, or has one of no meaning, is refused with the tensor's name."""
    converted = open_checkpoint(subject.converted())
    parts = subject.hook.nexus_enumerate_experts(config=converted.config)[-1].parts
    shared = set(converted.reader) - set(subject.checkpoint.reader)
    others = set(subject.checkpoint.reader) - {part.name for part in parts}
    lacking = [parts[0].name, sorted(shared)[0], next(name for name in sorted(others) if "norm" in name)]
    for number, name in enumerate(lacking):
        folder = _altered(converted, subject.work / f"lacks_{number}", drop=name)
        _require_refused(subject, folder, name, f"a checkpoint without '{name}'")
    folder = _altered(converted, subject.work / "has_more", add={UNKNOWN_TENSOR: torch.zeros(2)})
    _require_refused(subject, folder, UNKNOWN_TENSOR, f"a checkpoint with a tensor '{UNKNOWN_TENSOR}'")


def _require_refused(subject: Subject, folder: Path, name: str, what: str) -> None:
    try:
        subject.model(folder)
    except CheckpointError as error:
        require(name in str(error), f"{what} is refused without its name: {error}")
    else:
        raise BrokenContract(f"{what} is loaded without a word; transformers would fill in or drop it")


def _altered(source: Checkpoint, out: Path, *, drop: str = "", add: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A copy of a checkpoint without a tensor, or with some more."""
    out.mkdir(parents=True)
    left_out = {source.reader.entry(drop).shard.name} if drop else set()
    _, entries = link_shards(source.reader, out, left_out)
    moved = {
        name: source.reader.read(name)
        for name, entry in source.reader.entries.items()
        if entry.shard.name in left_out and name != drop
    } | dict(add or {})
    if moved:
        write_shard(out / "altered.safetensors", moved)
        entries = [*entries, *read_header(out / "altered.safetensors").values()]
    write_index(out, entries)
    write_json(out / "config.json", source.config)
    return out
