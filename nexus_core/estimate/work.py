"""What every stage computes and moves, and about how long that takes a device.

Time is arithmetic over rate plus bytes over bandwidth: decoding and products take turns, so they add up.

# L layers, K experts per token, T tokens of a pass, S sequence length, D hidden size, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_core.estimate.devices import Device
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.workload import Passes, Workload

# A multiplication and an addition.
FLOPS_PER_NUMBER = 2

# Reading an expert's bytes and writing a shared expert, from a disk as machines with such a GPU have.
DISK_BYTES_PER_SECOND = 1e9

# On a CPU decoding is bound by table look-ups: measured at a third of a copy's speed. On a GPU it is the copy's.
CPU_DECODE_SHARE = 0.33


@dataclass(frozen=True)
class Work:
    """tokens: that the stage looks at. flops: floating-point operations. moved_bytes: through the device's memory."""

    tokens: int
    flops: float
    moved_bytes: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.tokens and self.seconds else 0.0


def stage_work(model: ModelSize, work: Workload, device: Device) -> dict[str, Work]:
    """Work by stage, of all processes together, in the time that `work.processes` such devices take."""
    shared = model.shared_numbers(work.width)
    found = {
        "collect": _stage(model, work, device, work.collect, forwards=2.0 if work.gathers_neurons else 1.0),
        "convert": _convert(model, work, device),
        "validate": _stage(model, work, device, work.validate, forwards=2.0, heads=2.0, shared=shared),
    }
    if work.teacher == "offline":
        found["capture"] = _stage(model, work, device, work.train, forwards=1.0, heads=work.kept_share)
    # Of the layers: teacher, student, student again, gradients of inputs. Of the head, where the KL is: both models'
    # logits and a gradient; else the student's and a gradient.
    teacher = 1.0 if work.teacher == "online" else 0.0
    found["train"] = _stage(
        model,
        work,
        device,
        work.train,
        forwards=2.0 + teacher + (1.0 if work.recomputes else 0.0),
        heads=2.0 + work.kept_share * teacher,
        shared=shared,
        shared_passes=3.0 + (1.0 if work.recomputes else 0.0),
    )
    return found


def _stage(
    model: ModelSize,
    work: Workload,
    device: Device,
    passes: Passes,
    *,
    forwards: float,
    heads: float = 0.0,
    shared: int = 0,
    shared_passes: float = 1.0,
) -> Work:
    """forwards, heads, shared_passes: how often every token goes through the layers, the head, the shared experts."""
    costs, moe = model.costs, model.moe
    active = costs.layer_products + len(moe.layers) * moe.experts_per_token * model.expert_numbers
    context = sum(_context(passes.length, window) for window in costs.windows)
    per_token = FLOPS_PER_NUMBER * (
        forwards * (active + 2 * costs.heads * costs.head_size * context)
        + heads * model.head_numbers
        + shared_passes * shared
    )
    used = 1 - (1 - moe.experts_per_token / moe.experts) ** passes.batch_tokens
    # Decoded numbers are written once and read once by the products.
    decoding = 1.0 if device.kind != "cpu" else 1 / CPU_DECODE_SHARE
    experts = costs.packed_bytes + costs.decoded_numbers * work.number_bytes * (1 + decoding)
    others = costs.held_numbers * work.number_bytes
    count = -(-passes.tokens // max(passes.batch_tokens, 1))
    moved = count * forwards * (used * experts + others)
    flops = passes.tokens * per_token
    seconds = (flops / device.flops + moved / device.bandwidth) / work.processes
    return Work(passes.tokens, flops, moved, seconds)


def _context(length: int, window: int | None) -> float:
    """Tokens that a token looks back at, on average."""
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


def _convert(model: ModelSize, work: Workload, device: Device) -> Work:
    layers = len(model.moe.layers)
    stored = model.stored_bytes.get("routed_experts", 0) / max(model.moe.experts, 1)
    chosen = min(work.chosen, model.moe.experts)
    numbers = layers * chosen * model.expert_numbers
    moved = stored * chosen + 2 * model.shared_numbers(work.width)
    # A decode and a sum for every number, at what a core does: measured at 40 ms for an expert of 25 million.
    return Work(0, 2.0 * numbers, moved, moved / DISK_BYTES_PER_SECOND + numbers / 6e8)
