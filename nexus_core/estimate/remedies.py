"""What to change in a recipe that does not fit, tried on paper: each change by itself, then one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from nexus_core.estimate.devices import Device
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.stages import estimate_stages
from nexus_core.estimate.workload import Passes, Workload

SMALLEST_LENGTH = 128
MOST_NAMED = 4


@dataclass(frozen=True)
class Remedy:
    """A change of settings. needs_bytes: of the memory in question, afterwards. fits: whether that is enough."""

    settings: tuple[str, ...]
    needs_bytes: int
    fits: bool


def remedies(model: ModelSize, work: Workload, device: Device, host_bytes: int, stage: str, where: str) -> list[Remedy]:
    """Ways to make `stage` fit where it does not ("device" or "host"): single changes that are enough, the mildest
    first; or else all that helps together, which may still be too little.
    """
    room = device.available_bytes if where == "device" else host_bytes

    def needs(changed: Workload) -> int:
        memory = estimate_stages(model, changed, device)[stage].memory
        return memory.device_bytes if where == "device" else memory.host_bytes

    before = needs(work)
    enough, together, names = [], work, []
    for name, changed in _changes(model, work, stage, where):
        after = needs(changed)
        if after <= room:
            enough.append(Remedy((name,), after, True))
    if enough:
        return enough[:MOST_NAMED]
    for name, changed in _cumulative(model, work, stage, where):
        after = needs(changed)
        if after < before:
            together, before = changed, after
            names.append(name)
        if before <= room:
            break
    return [Remedy(tuple(names), needs(together), before <= room)] if names else []


def _cumulative(model: ModelSize, work: Workload, stage: str, where: str) -> Iterator[tuple[str, Workload]]:
    """Each kind of change on top of those before it, of every kind the strongest."""
    seen: Collection[str] = ()
    for name, _ in _changes(model, work, stage, where):
        kind = name.partition("=")[0]
        if kind in seen:
            continue
        seen = (*seen, kind)
        options = [(other, changed) for other, changed in _changes(model, work, stage, where) if other.startswith(kind)]
        name, work = options[-1]
        yield name, work


def _changes(model: ModelSize, work: Workload, stage: str, where: str) -> Iterator[tuple[str, Workload]]:
    """Changes as a person would write them after --set, the mildest first."""
    if stage == "generate":
        yield from _smaller_batches(work)
    section = stage if stage in ("collect", "validate") else "train"
    passes: Passes = {"collect": work.collect, "validate": work.validate}.get(section, work.train)

    def with_passes(changed: Passes) -> Workload:
        if section == "collect":
            return replace(work, collect=changed)
        return replace(work, validate=changed) if section == "validate" else replace(work, train=changed)

    if stage == "train" and not work.recomputes:
        yield "train.gradient_checkpointing=true", replace(work, recomputes=True)
    if stage == "train" and work.accumulation > 1:
        # The same step without sums of gradients.
        batch = passes.batch * work.accumulation
        at_once = replace(work, train=replace(passes, batch=batch), accumulation=1)
        yield f"train.batch_size={batch} train.gradient_accumulation=1", at_once
    if stage in ("collect", "train", "capture", "validate"):
        batch = passes.batch
        while batch > 1:
            batch //= 2
            yield f"{section}.batch_size={batch}", with_passes(replace(passes, batch=batch))
    if stage == "train":
        if where == "device" and not work.offloads_optimizer:
            offloaded = replace(work, offload="optimizer", zero_stage=max(work.zero_stage, 2))
            yield "run.deepspeed.offload=optimizer", offloaded
        for processes in (2, 4, 8):
            if processes > work.processes:
                zero = max(work.zero_stage, 2)
                yield f"run.processes={processes}", replace(work, processes=processes, zero_stage=zero)
        if where == "device" and work.zero_stage < 3:
            cut = replace(work, processes=max(work.processes, 2), zero_stage=3)
            yield f"run.deepspeed.zero_stage=3 run.processes={cut.processes}", cut
    if stage in ("collect", "train", "capture", "validate"):
        length = passes.length
        while length >= 2 * SMALLEST_LENGTH:
            length //= 2
            yield f"{section}.sequence_length={length}", with_passes(replace(passes, length=length))
    if stage in ("train", "convert", "validate"):
        width = work.width or model.moe.expert_width
        for part in (2, 4):
            yield f"convert.width={width // part}", replace(work, width=width // part)


def _smaller_batches(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Fewer completions at a time, of all lists of text alike."""
    texts = work.generate
    while any(text.batch > 1 for text in texts):
        texts = tuple(replace(text, batch=max(text.batch // 2, 1)) for text in texts)
        settings = " ".join(f"generate.{text.name}.batch_size={text.batch}" for text in texts)
        yield settings, replace(work, generate=texts)
