"""What every stage computes and moves, and about how long that takes a device.

Time is arithmetic over rate plus bytes over bandwidth: decoding and products take turns, so they add up. On a CPU also
what lies between products, and calling them.

# L layers, K experts per token, T tokens of a pass, S sequence length, D hidden size, V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nexus_core.estimate.devices import Device
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.workload import FLOAT32_BYTES, Passes, Workload

# A multiplication and an addition.
FLOPS_PER_NUMBER = 2

# Reading an expert's bytes and writing a shared expert, from a disk as machines with such a GPU have.
DISK_BYTES_PER_SECOND = 1e9

# On a CPU decoding in plain torch is bound by table look-ups: measured at a third of a copy's speed. On a GPU it is the
# copy's.
CPU_DECODE_SHARE = 0.33

# On a CPU everything number by number goes to memory that is taken anew: measured at a tenth of a copy's speed, of one
# core, for the numbers that are written. So many are, for each token and layer: by hidden size and neuron of a chosen
# expert, by hidden size of the rest, by head and its size, by head and other token; and by token of the vocabulary.
CPU_WRITE_SHARE = 0.1
ROW_HIDDEN, ROW_NEURONS, TOKEN_HIDDEN, HEAD_NUMBERS, SCORES, LOGITS = 2, 10, 8, 5, 6, 5

# What calling takes, whatever the size: a layer's attention, norms and router; an expert. Measured on one core with the
# embedded model at a token at a time, 13 ms a pass, and at 32, 37 ms.
CPU_LAYER_SECONDS = 2.3e-3
CPU_EXPERT_SECONDS = 2e-4


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
    if work.generate:
        found["generate"] = _generate(model, work, device)
    if work.teacher == "offline":
        found["capture"] = _stage(model.teacher or model, work, device, work.train, forwards=1.0, heads=work.kept_share)
    # Of the layers: teacher, student, student again, gradients of inputs. Of the head, where the KL is: both models'
    # logits and a gradient; else the student's and a gradient.
    teacher = 1.0 if work.teacher == "online" else 0.0
    found["train"] = _stage(
        model,
        work,
        device,
        work.own_train,
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
    context = sum(_context(passes.length, window) for window in model.costs.windows)
    per_token = (
        forwards * _layer_flops(model, context)
        + FLOPS_PER_NUMBER * heads * model.head_numbers
        + FLOPS_PER_NUMBER * shared_passes * shared
    )
    count = -(-passes.tokens // max(passes.batch_tokens, 1))
    moved = count * forwards * _pass_bytes(model, work, device, passes.batch_tokens)
    between = forwards * _between_products(model, work, device, passes.tokens, passes.length)
    between += heads * _logits_seconds(model, work, device, passes.tokens)
    calling = forwards * count * _calling_seconds(model, device, passes.batch_tokens)
    return _work(work, device, passes.tokens, passes.tokens * per_token, moved, between + calling)


def _generate(model: ModelSize, work: Workload, device: Device) -> Work:
    """Prompts a batch at once, then token after token, each reading the keys and values of all before it, to the
    longest completions that there may be.
    """
    costs, tokens, flops, moved, beside = model.costs, 0, 0.0, 0.0, 0.0
    for text in work.generate:
        batches = -(-text.count // text.batch)
        prompts, written = round(text.count * text.prompts.mean), text.count * text.new
        asked = sum(_context(text.prompts.mean, window) for window in costs.windows)
        seen = sum(min(text.prompts.mean + text.new / 2, window or math.inf) for window in costs.windows)
        flops += prompts * _layer_flops(model, asked)
        flops += written * (_layer_flops(model, seen) + FLOPS_PER_NUMBER * model.head_numbers)
        moved += batches * _pass_bytes(model, work, device, round(text.batch * text.prompts.mean))
        moved += batches * text.new * _pass_bytes(model, work, device, text.batch)
        moved += written * seen * model.cached_numbers * work.number_bytes
        beside += _between_products(model, work, device, prompts, text.prompts.mean)
        beside += _between_products(model, work, device, written, text.prompts.mean + text.new / 2)
        beside += _logits_seconds(model, work, device, written)
        beside += batches * text.new * _calling_seconds(model, device, text.batch)
        tokens += written
    return _work(work, device, tokens, flops, moved, beside)


def _work(work: Workload, device: Device, tokens: int, flops: float, moved: float, beside: float) -> Work:
    """beside: seconds that are neither arithmetic's nor moving's."""
    return Work(tokens, flops, moved, (flops / device.flops + moved / device.bandwidth + beside) / work.processes)


def _between_products(model: ModelSize, work: Workload, device: Device, tokens: int, length: float) -> float:
    """Seconds that a CPU takes for what one pass of these tokens, in sequences of `length`, does between products."""
    if device.kind != "cpu":
        return 0.0
    costs, moe = model.costs, model.moe
    row = ROW_HIDDEN * moe.hidden_size + ROW_NEURONS * moe.expert_width
    holds_scores = costs.score_numbers > 0 and length <= (costs.score_tokens or math.inf)
    scores = SCORES * length if holds_scores else 0.0
    each = TOKEN_HIDDEN * moe.hidden_size + costs.heads * (HEAD_NUMBERS * costs.head_size + scores)
    numbers = tokens * (len(moe.layers) * moe.experts_per_token * row + model.layers * each)
    return numbers * work.number_bytes / (CPU_WRITE_SHARE * device.bandwidth)


def _logits_seconds(model: ModelSize, work: Workload, device: Device, tokens: int) -> float:
    """Seconds that a CPU takes for what is made of these tokens' logits."""
    if device.kind != "cpu":
        return 0.0
    return tokens * LOGITS * model.moe.vocabulary_size * FLOAT32_BYTES / (CPU_WRITE_SHARE * device.bandwidth)


def _calling_seconds(model: ModelSize, device: Device, tokens: int) -> float:
    """Of one pass of so many tokens on a CPU; a GPU is given its work while it is at what it was given before."""
    if device.kind != "cpu":
        return 0.0
    moe = model.moe
    return CPU_LAYER_SECONDS * model.layers + CPU_EXPERT_SECONDS * len(moe.layers) * moe.experts * _used(model, tokens)


def _used(model: ModelSize, tokens: int) -> float:
    """Share of a layer's experts that a pass of so many tokens uses, were they chosen by lot."""
    return 1 - (1 - model.moe.experts_per_token / model.moe.experts) ** tokens


def _layer_flops(model: ModelSize, context: float) -> float:
    """Of a token on its way through all layers. context: tokens that it looks back at, summed over the layers."""
    costs, moe = model.costs, model.moe
    active = costs.layer_products + len(moe.layers) * moe.experts_per_token * model.expert_numbers
    return FLOPS_PER_NUMBER * (active + 2 * costs.heads * costs.head_size * context)


def _pass_bytes(model: ModelSize, work: Workload, device: Device, tokens: int) -> float:
    """Of weights that a pass of so many tokens moves; more tokens use more of the experts."""
    costs = model.costs
    # Decoded numbers are written once and read once by the products.
    decoding = 1.0 if device.kind != "cpu" else 1 / CPU_DECODE_SHARE
    experts = costs.packed_bytes + costs.decoded_numbers * work.number_bytes * (1 + decoding)
    return _used(model, tokens) * experts + costs.held_numbers * work.number_bytes


def _context(length: float, window: int | None) -> float:
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
