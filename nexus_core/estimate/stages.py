"""Every stage's estimate in one place, and which of them a device cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nexus_core.estimate.devices import Device
from nexus_core.estimate.disk import stage_disk
from nexus_core.estimate.memory import stage_memory
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.parts import Memory
from nexus_core.estimate.work import Work, stage_work
from nexus_core.estimate.workload import Workload

ORDER = ("generate", "collect", "select", "convert", "capture", "train", "validate")
NO_WORK = Work(0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class StageEstimate:
    """One stage: its memory by part, new bytes on disk, and its work."""

    memory: Memory
    disk_bytes: int
    work: Work

    def overflow(self, device: Device, host_bytes: int | None) -> str | None:
        """Which memory is too small for it: "device", "host", or None. host_bytes: None if it is not known."""
        if device.kind != "cpu" and self.memory.device_bytes > device.available_bytes:
            return "device"
        return "host" if host_bytes is not None and self.memory.host_bytes > host_bytes else None


def estimate_stages(model: ModelSize, work: Workload, device: Device) -> Mapping[str, StageEstimate]:
    """By stage, in the order in which they run; `generate` and `capture` only if the recipe has them."""
    memory, disk = stage_memory(model, work, device.kind), stage_disk(model, work)
    spent = stage_work(model, work, device)
    return {
        stage: StageEstimate(memory[stage], disk.get(stage, 0), spent.get(stage, NO_WORK))
        for stage in ORDER
        if stage in memory
    }
