"""What can be known before anything runs: about what it will take, and whether there is as much."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nexus_core.checkpoint.reader import INDEX_NAME
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.errors import CheckpointError, PluginError, UsageError
from nexus_core.estimate import (
    Device,
    ModelSize,
    Remedy,
    StageEstimate,
    Workload,
    estimate_stages,
    find_device,
    remedies,
)
from nexus_core.estimate.model import plain_costs
from nexus_core.models import choose_device
from nexus_core.pipeline.machine import found_device, free_disk_bytes, host_memory_bytes, on_one_disk
from nexus_core.pipeline.prompts import look_at_prompts
from nexus_core.processes import world
from nexus_core.recipe.schema import Recipe
from nexus_core.routing import ROUTER_DELTA
from nexus_core.stages.collect import wanted_statistics
from nexus_core.stages.train import training_objective
from nexus_core.train.teacher_store import CHUNK_TOKENS
from nexus_core.types import RunningCosts

# Some memory is always somebody else's: a stage whose estimate is this much of it is refused.
REFUSED_ABOVE = 1.05


@dataclass(frozen=True)
class MissingWeights:
    """Weights that a run reads and that are not here. name: as the user gave the model. is_downloaded: a run fetches
    what of them is missing into `folder`; else the user has to put them there. download_bytes: what is missing.
    on_store_disk: whether `folder` and the store share a disk; free_disk_bytes: of the folder's.
    """

    name: str
    folder: Path
    stored_bytes: int
    download_bytes: int
    is_downloaded: bool
    on_store_disk: bool
    free_disk_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, store: Path) -> MissingWeights:
        total = sum(stored_bytes(checkpoint).values())
        here = sum(shard.stat().st_size for shard in checkpoint.folder.glob("*.safetensors"))
        return cls(
            checkpoint.name,
            checkpoint.folder,
            total,
            max(total - here, 0) if checkpoint.is_from_hub else 0,
            checkpoint.is_from_hub,
            on_one_disk(checkpoint.folder, store),
            free_disk_bytes(checkpoint.folder),
        )


@dataclass(frozen=True)
class Misfit:
    """A stage that does not fit. where: "device", "host" or "disk". ways_out: changes that help, mildest first.

    stage: of a disk "all", or the name of the model that would be downloaded to it.
    """

    stage: str
    where: str
    needs_bytes: int
    has_bytes: int
    ways_out: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class Preflight:
    """A recipe's estimate on a device. host_bytes: of this machine, None if the device is only named. stages: by name,
    in order. free_disk_bytes: where the store is. missing: weights that are not here. notes: what could not be counted.
    """

    model: ModelSize
    work: Workload
    device: Device
    host_bytes: int | None
    stages: Mapping[str, StageEstimate]
    free_disk_bytes: int
    missing: tuple[MissingWeights, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        return self.model.shared_numbers(self.work.width)

    @property
    def stage_disk_bytes(self) -> int:
        """New bytes of all stages."""
        return sum(stage.disk_bytes for stage in self.stages.values())

    @property
    def download_bytes(self) -> int:
        """Of weights that a run would fetch first."""
        return sum(weights.download_bytes for weights in self.missing)

    @property
    def disk_bytes(self) -> int:
        """All that a run would write."""
        return self.stage_disk_bytes + self.download_bytes

    @cached_property
    def misfits(self) -> tuple[Misfit, ...]:
        """Stages that need more memory than there is, and the disk, if all of them together need more."""
        found = []
        room = {"device": self.device.available_bytes, "host": self.host_bytes or 0}
        for name, stage in self.stages.items():
            where = stage.overflow(self.device, self.host_bytes)
            if where:
                needs = stage.memory.device_bytes if where == "device" else stage.memory.host_bytes
                host = self.host_bytes if self.host_bytes is not None else needs
                ways_out = remedies(self.model, self.work, self.device, host, name, where)
                found.append(Misfit(name, where, needs, room[where], tuple(ways_out)))
        if self.host_bytes is not None:
            found += self._full_disks()
        return tuple(found)

    def _full_disks(self) -> list[Misfit]:
        beside = [weights for weights in self.missing if not weights.on_store_disk]
        needs = self.disk_bytes - sum(weights.download_bytes for weights in beside)
        found = [Misfit("all", "disk", needs, self.free_disk_bytes)]
        found += [Misfit(each.name, "disk", each.download_bytes, each.free_disk_bytes) for each in beside]
        return [misfit for misfit in found if misfit.needs_bytes > misfit.has_bytes]

    def refuse_misfits(self, stages: Collection[str]) -> None:
        """Raises UsageError, with what to change, if one of the stages that are to run cannot fit."""
        for misfit in self.misfits:
            if misfit.where == "disk" or misfit.stage not in stages:
                continue
            # Packed experts are mapped from their files on a CPU: too little memory makes that slow, not impossible.
            mapped = self.model.costs.packed_bytes if self.device.kind == "cpu" else 0
            if misfit.needs_bytes - mapped > misfit.has_bytes * REFUSED_ABOVE:
                raise UsageError(f"{self.sentence(misfit)}. To start it all the same, give --anyway")

    def sentence(self, misfit: Misfit) -> str:
        """What is too small for what, and what to change."""
        if misfit.where == "disk" and misfit.stage != "all":
            return (
                f"the weights of {misfit.stage} take {size(misfit.needs_bytes)} and the disk of the Hub's cache has "
                f"{size(misfit.has_bytes)} free; name another with the environment's HF_HOME"
            )
        if misfit.where == "disk":
            fetched = " and the download of weights" if misfit.needs_bytes > self.stage_disk_bytes else ""
            return (
                f"the stages{fetched} write about {size(misfit.needs_bytes)} and the disk has "
                f"{size(misfit.has_bytes)} free; name another with run.store"
            )
        place = self.device.name if misfit.where == "device" else "the machine"
        said = f"{misfit.stage} needs about {size(misfit.needs_bytes)} and {place} has {size(misfit.has_bytes)}"
        ways = [way for way in misfit.ways_out if way.fits]
        if ways:
            options = "; or ".join(f"{' '.join(way.settings)} ({size(way.needs_bytes)})" for way in ways)
            return f"{said}. Enough would be: {options}"
        if misfit.ways_out:
            best = misfit.ways_out[0]
            return f"{said}. Not even {' '.join(best.settings)} would be enough ({size(best.needs_bytes)})"
        return f"{said}; a smaller model or a larger device is needed"


def look_ahead(
    recipe: Recipe,
    checkpoint: Checkpoint,
    named: str | None = None,
    *,
    teacher: Checkpoint | None = None,
    timed: bool = True,
) -> Preflight:
    """What the recipe will take with this checkpoint, computed without reading a weight.

    named: a device of the table instead of the one found here, e.g. "h200". teacher: the other model that `capture`
    runs, if there is one. timed: with the time it takes; on a CPU that means to measure how fast it is. Raises
    UsageError if the table has no such device.
    """
    if named is None:
        name = choose_device(recipe.run.device)
        narrow = recipe.model.dtype == "bfloat16"
        device = found_device(name, ("bfloat16" if narrow else "float32") if timed else None)
        host_bytes = host_memory_bytes()
    else:
        device, host_bytes = find_device(named), None
    model = model_size(checkpoint, device.kind)
    if teacher is not None:
        model = replace(model, teacher=model_size(teacher, device.kind))
    store = Path(recipe.run.store).expanduser()
    read = [checkpoint, *([teacher] if teacher else [])]
    missing = tuple(MissingWeights.of(each, store) for each in read if each.lacks_weights)
    prompts, notes = look_at_prompts(recipe, checkpoint, counted=timed)
    work = Workload.of(
        recipe,
        device.kind,
        prompts=prompts,
        gathers_neurons=wanted_statistics(recipe).expert_norms,
        router_learns=ROUTER_DELTA in training_objective(recipe.train).routing.needs,
        capture_tokens=CHUNK_TOKENS,
    )
    work = replace(work, processes=max(work.processes, world().size))
    stages = estimate_stages(model, work, device)
    return Preflight(model, work, device, host_bytes, stages, free_disk_bytes(store), missing, notes)


def model_size(checkpoint: Checkpoint, kind: str) -> ModelSize:
    """Sizes and costs of a checkpoint on a kind of device: its family's answers, or what a plain family's would be."""
    stored = stored_bytes(checkpoint)
    return ModelSize(checkpoint.description, running_costs(checkpoint, stored, kind), stored)


def running_costs(checkpoint: Checkpoint, stored: Mapping[str, int], kind: str) -> RunningCosts:
    """The family's own, or those of a plain one."""
    try:
        answer: RunningCosts = checkpoint.family.hook.nexus_running_costs(config=checkpoint.config, device=kind)
    except PluginError:
        return plain_costs(checkpoint.config, checkpoint.description, stored)
    return answer


def stored_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the checkpoint by part, as the family says; in one sum, from the shards or their index, if it does not.

    Raises CheckpointError if neither says.
    """
    try:
        return dict(checkpoint.family.hook.nexus_stored_bytes(config=checkpoint.config))
    except PluginError:
        pass
    if not checkpoint.lacks_weights:
        return {"tensors": sum(entry.stored_bytes for entry in checkpoint.reader.entries.values())}
    if checkpoint.indexed_bytes is None:
        raise CheckpointError(
            f"{checkpoint.folder}: has neither weights nor {INDEX_NAME}, and the family '{checkpoint.family.name}' "
            "does not say how large they are; put one of them there"
        )
    return {"tensors": checkpoint.indexed_bytes}


def size(count: float) -> str:
    """Bytes in the decimal units that disks are sold in."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} B"
