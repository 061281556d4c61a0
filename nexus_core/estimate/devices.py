"""What devices can do, by name: from their makers' data sheets, dense rates without sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nexus_core.errors import UsageError, suggestion

# What programs reach of a data sheet's numbers, in long runs: the budget for training at scale counts on 400 of an
# H200's 989 TFLOP/s and 3 of its 4.8 TB/s.
REACHED_RATE = 0.4
REACHED_BANDWIDTH = 0.62

# What a GPU's libraries hold beside tensors: the context, cuBLAS workspaces, and what the allocator cannot use.
CONTEXT_BYTES = 1_200_000_000

# What the driver keeps of the memory it reports: torch finds 23.64 GiB in an RTX 4090 of 24,564 MiB and 139.80 GiB in
# an H200 of 143,771 MiB.
DRIVER_BYTES = 600_000_000


@dataclass(frozen=True)
class Device:
    """A device to estimate for. memory_bytes: all of it; the rates are what a program can expect, not the data sheet's.

    kind: "cuda", "cpu". bandwidth: bytes per second of its memory. flops: floating-point operations per second of
    matrix products in the type that is computed in. measured: whether the rates were, here and now. reserved_bytes:
    what of the memory no tensor gets.
    """

    name: str
    kind: str
    memory_bytes: int
    bandwidth: float
    flops: float
    measured: bool = False
    reserved_bytes: int = 0

    @property
    def available_bytes(self) -> int:
        """What tensors can have of the memory."""
        return max(self.memory_bytes - self.reserved_bytes, 0)

    def with_memory(self, memory_bytes: int) -> Device:
        """The same with the memory that torch finds in it, which is without the driver's part."""
        return replace(self, memory_bytes=memory_bytes, reserved_bytes=CONTEXT_BYTES)


def _gpu(name: str, memory_mib: int, terabytes_per_second: float, bf16_teraflops: float) -> Device:
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=memory_mib * 2**20,
        bandwidth=terabytes_per_second * 1e12 * REACHED_BANDWIDTH,
        flops=bf16_teraflops * 1e12 * REACHED_RATE,
        reserved_bytes=CONTEXT_BYTES + DRIVER_BYTES,
    )


# Memory in MiB as nvidia-smi reports it of the product (AMD's: rocm-smi), which is less than the name says where error
# correction takes part of it; then TB/s and dense bfloat16 TFLOP/s with float32 sums, by the data sheets.
DEVICES = {
    device.name: device
    for device in (
        _gpu("b200", 183_359, 8.0, 2250.0),
        _gpu("h200", 143_771, 4.8, 989.0),
        _gpu("h100", 81_559, 3.35, 989.0),
        _gpu("h100-pcie", 81_559, 2.0, 756.0),
        _gpu("h20", 97_871, 4.0, 148.0),
        _gpu("a100-80g", 81_920, 2.04, 312.0),
        _gpu("a100-40g", 40_960, 1.56, 312.0),
        _gpu("rtx-pro-6000", 97_887, 1.79, 252.0),
        _gpu("rtx-6000-ada", 49_140, 0.96, 182.0),
        _gpu("rtx-5090", 32_607, 1.79, 105.0),
        _gpu("rtx-4090", 24_564, 1.01, 82.6),
        _gpu("rtx-3090", 24_576, 0.94, 35.6),
        _gpu("l40s", 46_068, 0.86, 181.0),
        _gpu("l4", 23_034, 0.30, 60.5),
        _gpu("a10g", 23_028, 0.60, 70.0),
        _gpu("mi300x", 196_592, 5.3, 1307.0),
        _gpu("mi325x", 262_128, 6.0, 1307.0),
    )
}

# A GPU that is in no table, until somebody measures it: a mid-range one.
UNKNOWN_GPU = _gpu("unknown", 0, 1.0, 100.0)


def find_device(name: str) -> Device:
    """The device of the table that a person means by `name`, e.g. "h200" or "RTX 4090".

    Raises UsageError with the names that there are.
    """
    found = {_plain(known): device for known, device in DEVICES.items()}.get(_plain(name))
    if found is None:
        raise UsageError(
            f"device '{name}' is not in the table{suggestion(name.lower(), DEVICES)}; it has {', '.join(DEVICES)}"
        )
    return found


def recognise(product: str, memory_bytes: int) -> Device:
    """The device that a driver calls `product`, e.g. "NVIDIA H200 NVL", with the memory found in it.

    The longest name of the table that occurs in the product's; where memory is part of a name, the nearest.
    """
    plain = _plain(product)
    candidates = [device for known, device in DEVICES.items() if _plain(re.sub(r"-\d+g$", "", known)) in plain]
    if not candidates:
        return replace(UNKNOWN_GPU, name=product).with_memory(memory_bytes)
    longest = max(len(re.sub(r"-\d+g$", "", device.name)) for device in candidates)
    best = [device for device in candidates if len(re.sub(r"-\d+g$", "", device.name)) == longest]
    return min(best, key=lambda device: abs(device.memory_bytes - memory_bytes)).with_memory(memory_bytes)


def _plain(name: str) -> str:
    return re.sub(r"generation|nvidia|geforce|amd|instinct|[^a-z0-9]", "", name.lower())
