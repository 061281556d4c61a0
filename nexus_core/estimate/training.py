"""Memory of training: gradients, the optimizer's numbers, what autograd keeps, and the moments of a step.

# L layers, T tokens of a micro-batch, D hidden size
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.parts import (
    KL_BUFFERS,
    LM_BUFFERS,
    TRAINING_PRODUCTS,
    Memory,
    attention_scores,
    compiled_products,
    decode_buffer,
    held_weights,
    layer_bytes,
    layer_forward,
    router_outputs,
    vocabulary_chunks,
)
from nexus_core.estimate.workload import FLOAT32_BYTES, Workload

# A gradient is of its parameter's type until a second one is added to it, and float32 from then on.
SUM_BYTES = 4
# AdamW's two moments; beside a parameter in 16 bits what rounding took from its float32 numbers, or all of these where
# they lie in parts.
MOMENT_BYTES = 8
REMAINDER_BYTES = 2
MASTER_BYTES = 4

# Float32 numbers and gradient of one piece of a parameter, while it is stepped.
PIECE_NUMBERS = {"cpu": 2**18, "cuda": 2**24}

# Numbers that DeepSpeed reduces at once: two buckets of the gradients' type, one filled while the other is sent, in
# float32 then.
BUCKET_NUMBERS = 50_000_000


def _loss_chunks(model: ModelSize, work: Workload, kind: str) -> int:
    """The larger of the two losses over the vocabulary, each over the rows of a micro-batch that are its own."""
    batch = work.own_train.batch
    kept, learnt = (math.ceil(batch * share) for share in (work.kept_share, 1 - work.kept_share))
    losses = {"lm": (learnt, LM_BUFFERS)}
    if "logits_kl" in work.losses:
        losses["logits_kl"] = (kept, KL_BUFFERS if work.teacher == "online" else LM_BUFFERS)
    return max(
        vocabulary_chunks(model, replace(work.own_train, batch=rows), kind, buffers)
        for rows, buffers in losses.values()
        if rows
    )


def train_memory(model: ModelSize, work: Workload, kind: str) -> Memory:
    """Of the fullest of the moments of a step; activations go as gradients come, layer by layer."""
    passes, number, moe, costs = work.own_train, work.number_bytes, model.moe, model.costs
    T, D, L = passes.batch_tokens, moe.hidden_size, model.layers
    neurons = work.width or moe.expert_width
    optimizer = _optimizer(model, work, kind)
    # Nothing below the first shared expert learns, so the first layer keeps only what that expert needs.
    deep = max(L - 1, 1)
    kept_layer = round(T * (costs.kept_numbers * number + costs.kept_bytes))
    kept_shared = round(T * costs.shared_numbers * neurons * number)
    kept_scores = attention_scores(model, work, passes, costs.kept_score_numbers)
    # Final hidden states of student and teacher, those of tokens that count, and their gradient.
    final = 5 * T * D * number
    watched = "router_kl" in work.losses
    # Logits of both, and both softmaxes in float32 for the loss.
    routers = router_outputs(model, passes, 2 * number + (8 if watched else 0), number + 8)
    if work.recomputes:
        kept = {"activations": L * T * D * number, "attention": 0}
        again = {"one layer computed again": kept_layer + kept_shared}
        scores, last = costs.score_numbers, T * D * number
    else:
        kept = {"activations": deep * kept_layer + L * kept_shared, "attention": deep * kept_scores}
        again = {}
        scores, last = costs.score_numbers - costs.kept_score_numbers, kept_layer + kept_shared
    forward = layer_forward(model, work, passes, shared=True)
    backward = {
        "one layer at work": layer_bytes(work, passes, costs.backward_numbers, costs.sliced_backward),
        **decode_buffer(model, work),
    }
    attention_again = kept_scores if work.recomputes else 0
    weights, weights_on_host = _weights(model, work)
    moments = {
        # The last layer has kept nothing yet.
        "forward": {
            **optimizer.early,
            **forward,
            "activations": kept["activations"] - last,
            "attention": max(kept["attention"] - kept_scores, 0) + forward["attention"],
        },
        "vocabulary": {**optimizer.early, **kept, "vocabulary chunks": _loss_chunks(model, work, kind)},
        # On the way back a layer's experts come first; when its attention does, what they had kept is gone.
        "back through experts": {
            **optimizer.early,
            **kept,
            **again,
            **backward,
            "attention": kept["attention"] + attention_again,
        },
        "back through attention": {
            **optimizer.early,
            "activations": kept["activations"] - (0 if work.recomputes else kept_layer + kept_shared),
            "attention": kept["attention"] + attention_scores(model, work, passes, scores),
            "one layer at work": round(T * costs.forward_numbers * number),
        },
        "back through the first layer": {**optimizer.late, "activations": last, **again, **backward},
        "step": optimizer.step,
    }
    if work.teacher == "online":
        moments["teacher"] = {**optimizer.early, **layer_forward(model, work, passes, shared=False)}
    lasting = {
        **weights,
        **optimizer.lasting,
        "router outputs": routers,
        "final hidden states": final,
        **compiled_products(model, work, passes, kind, TRAINING_PRODUCTS),
    }
    return Memory(lasting, moments, {**optimizer.host, **weights_on_host})


def _weights(model: ModelSize, work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """On the device, and in the machine's memory."""
    weights = held_weights(model, work, shared=True)
    host: dict[str, int] = {}
    if not (work.is_cut and work.zero_stage == 3):
        return weights, host
    cut = {name: count // work.processes for name, count in weights.items()}
    if work.offload == "parameters":
        host = {f"{name}, offloaded": count for name, count in cut.items()}
        # A layer is gathered while it is at work, and the next one beside it.
        cut = {"gathered layers": 2 * sum(weights.values()) // model.layers}
    # Losses read the output head outside of forward passes, so every process keeps a whole one.
    return {**cut, "output head": model.head_numbers * work.number_bytes}, host


@dataclass(frozen=True)
class _Optimizer:
    """By part: there all the time; before a micro-batch's way back; at the end of it; while parameters are stepped; and
    what lies in the machine's memory.
    """

    lasting: dict[str, int]
    early: dict[str, int]
    late: dict[str, int]
    step: dict[str, int]
    host: dict[str, int]


def _optimizer(model: ModelSize, work: Workload, kind: str) -> _Optimizer:
    trained, number = trainable_numbers(model, work), work.number_bytes
    is_narrow = number < FLOAT32_BYTES
    # Every process keeps a whole one, in the machine's memory.
    anchor = {"anchor": trained * FLOAT32_BYTES} if work.anchors else {}
    if work.is_cut:
        return _cut_optimizer(work, trained, anchor)
    states = trained * (MOMENT_BYTES + (REMAINDER_BYTES if is_narrow else 0))
    # A second micro-batch's gradients, one parameter's at a time, find the first one's sums; other processes' are added
    # at the end.
    is_summed = work.own_accumulation > 1
    summed, arrived = ({"gradients": trained * each} for each in (SUM_BYTES, number))
    pieces = 2 * min(PIECE_NUMBERS[kind], trained) * FLOAT32_BYTES if is_narrow else 0
    return _Optimizer(
        {"optimizer states": states},
        summed if is_summed else {},
        summed if is_summed else arrived,
        {**(summed if is_summed or work.processes > 1 else arrived), "one piece's step": pieces},
        anchor,
    )


def _cut_optimizer(work: Workload, trained: int, anchor: dict[str, int]) -> _Optimizer:
    """In parts on all processes, by DeepSpeed."""
    is_narrow = work.number_bytes < FLOAT32_BYTES
    states = trained * (MOMENT_BYTES + (MASTER_BYTES if is_narrow else 0)) // work.processes
    # In bfloat16 stage 1 is done as stage 2.
    cuts_gradients = work.zero_stage >= 2 or is_narrow
    gradients = trained * SUM_BYTES // (work.processes if cuts_gradients else 1)
    buckets = {"buckets of gradients": min(BUCKET_NUMBERS, trained) * (2 * work.number_bytes + FLOAT32_BYTES)}
    if work.offloads_optimizer:
        host = {**anchor, "optimizer states, offloaded": states + gradients}
        return _Optimizer(buckets, {}, {}, {}, host)
    summed = {"gradients": gradients}
    return _Optimizer({"optimizer states": states, **buckets}, summed, summed, summed, anchor)


def trainable_numbers(model: ModelSize, work: Workload) -> int:
    """Parameters that training moves: shared experts, and the routers' changes if the router learns."""
    routers = len(model.moe.layers) * model.moe.experts * (model.moe.hidden_size + 1)
    return model.shared_numbers(work.width) + (routers if work.router_learns else 0)
