"""Memory of every stage by part: what stays for the whole stage, and the fullest of the moments that come and go.

# L layers, E experts, K experts per token, T tokens of a micro-batch, S sequence length, D hidden size, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nexus_core.distill.vocabulary import CHUNK_ELEMENTS
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.workload import BFLOAT16_BYTES, FLOAT32_BYTES, Passes, Workload
from nexus_core.merge.effect import TILE_NEURONS
from nexus_core.merge.experts import TILE_NUMBERS

FLOAT64_BYTES = 8

# A gradient is summed in float32, whatever the model computes in.
GRADIENT_BYTES = 4
# AdamW's two moments, and a float32 copy of what is held in fewer bits.
MOMENT_BYTES = 8
MASTER_BYTES = 4

# The part that is mapped from its files where the device is the host.
MAPPED = "packed experts"

# Python, torch and transformers, imported, with a tokenizer and some text; a GPU's libraries take more of the host.
PROGRAM_BYTES = {"cpu": 300_000_000, "cuda": 3_000_000_000}

# Records, their tokens and what they are chosen by, before there are sequences: of data sets of a few megabytes.
TEXT_BYTES = 8_000_000

# Buffers of a chunk of float32 logits: student, teacher, and one between them; only the student's without a teacher.
KL_BUFFERS = 3
LM_BUFFERS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes by part. lasting: for the whole stage. moments: what comes and goes, by moment, each by part; only one of
    them is at a time. host: in the machine's memory where that is not the device's.
    """

    lasting: Mapping[str, int]
    moments: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def fullest(self) -> Mapping[str, int]:
        """The parts of the moment that takes most."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()), default={})

    @property
    def parts(self) -> dict[str, int]:
        """All parts that are there at the fullest moment."""
        return {name: size for name, size in {**self.lasting, **self.fullest}.items() if size > 0}

    @property
    def device_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def stage_memory(model: ModelSize, work: Workload, kind: str) -> dict[str, Memory]:
    """Memory by stage on a device of `kind`, "cpu" or "cuda"; on a CPU the device is the host."""
    found = {
        "collect": _collect(model, work),
        "select": Memory({"router statistics": _moments(model, work)}),
        "convert": _convert(model, work),
        "train": _train(model, work, kind),
        "validate": _validate(model, work, kind),
    }
    if work.teacher == "offline":
        found["capture"] = _capture(model, work, kind)
    return {stage: _with_host(stage, memory, work, kind) for stage, memory in found.items()}


def _with_host(stage: str, memory: Memory, work: Workload, kind: str) -> Memory:
    """What the machine itself must have: all of it without a GPU, or for stages that use none."""
    program = {"program and libraries": PROGRAM_BYTES["cpu" if stage in ("select", "convert") else kind]}
    if stage in ("select", "convert"):
        return Memory({}, {}, {**program, **memory.host, **memory.parts})
    # Processes, all on this machine as far as is known, share nothing of it but mapped files.
    host = {**program, **memory.host, **(memory.parts if kind == "cpu" else {})}
    whole = {name: size if name == MAPPED else work.processes * size for name, size in host.items()}
    return Memory({}, {}, whole) if kind == "cpu" else Memory(memory.lasting, memory.moments, whole)


def _weights(model: ModelSize, work: Workload, *, shared: bool) -> dict[str, int]:
    own = model.moe.shared_expert_width
    others = model.costs.held_numbers - (model.shared_numbers(own) if own else 0)
    return {
        MAPPED: model.costs.packed_bytes,
        "other weights": others * work.number_bytes,
        "shared experts": model.shared_numbers(work.width) * work.number_bytes if shared else 0,
    }


def _decode_buffer(model: ModelSize, work: Workload) -> dict[str, int]:
    return {"decode buffer": model.costs.buffer_numbers * work.number_bytes}


def _scores(model: ModelSize, work: Workload, passes: Passes, numbers: float) -> int:
    """One layer's attention scores; none where its kernel writes none down."""
    costs = model.costs
    if costs.score_tokens is not None and passes.length > costs.score_tokens:
        return 0
    return round(numbers * costs.heads * passes.batch * passes.length**2 * work.number_bytes)


def _forward(model: ModelSize, work: Workload, passes: Passes, *, shared: bool) -> dict[str, int]:
    """One layer on the way forward: the larger of its attention and its experts, which are not at the same time."""
    neurons = (work.width or model.moe.expert_width) if shared else 0
    per_token = model.costs.forward_numbers + model.costs.shared_numbers * neurons
    layer = round(passes.batch_tokens * per_token * work.number_bytes)
    return {
        "attention": _scores(model, work, passes, model.costs.score_numbers),
        "one layer at work": layer,
        **_decode_buffer(model, work),
    }


def _moments(model: ModelSize, work: Workload) -> int:
    """Router statistics: two matrices and five vectors a layer, and what each neuron does, if that is gathered."""
    layers, experts = len(model.moe.layers), model.moe.experts
    sums = layers * (2 * experts**2 + 5 * experts) * FLOAT64_BYTES
    neurons = layers * experts * model.moe.expert_width * work.data_sets * FLOAT64_BYTES
    return sums + (neurons if work.gathers_neurons else 0)


def _router_outputs(model: ModelSize, passes: Passes, per_expert: float, per_choice: float) -> int:
    moe = model.moe
    per_token = moe.experts * per_expert + moe.experts_per_token * per_choice
    return round(len(moe.layers) * passes.batch_tokens * per_token)


def _kept_inputs(model: ModelSize, work: Workload) -> int:
    return 2 * work.keep_inputs * len(model.moe.layers) * model.moe.hidden_size * FLOAT32_BYTES


def _collect(model: ModelSize, work: Workload) -> Memory:
    passes, number = work.collect, work.number_bytes
    hears = work.keep_inputs or work.gathers_neurons
    heard = 2 * len(model.moe.layers) * passes.batch_tokens * model.moe.hidden_size * number if hears else 0
    lasting = {
        **_weights(model, work, shared=False),
        "router statistics": _moments(model, work),
        "router outputs": _router_outputs(model, passes, number, number + 8),
        "layer inputs heard": heard,
    }
    # Ids, positions and data set of every token, and what reading and drawing them takes.
    text = TEXT_BYTES + 24 * work.collect.tokens
    return Memory(
        lasting,
        {"forward": _forward(model, work, passes, shared=False)},
        {"inputs kept for convert": _kept_inputs(model, work), "text": text},
    )


def _convert(model: ModelSize, work: Workload) -> Memory:
    width = work.width or model.moe.expert_width
    merged = model.shared_numbers(width) // max(len(model.moe.layers), 1)
    # As stored, one layer at a time, with a down-projection as it begins; beside the tiles it is summed in, and one
    # layer's kept inputs and outputs, compared in float64 with what some neurons at a time make of them.
    D = model.moe.hidden_size
    begins = D * width
    tiles = 4 * TILE_NUMBERS * FLOAT32_BYTES
    kept = work.keep_inputs * D * (3 * FLOAT32_BYTES + 2 * FLOAT64_BYTES)
    neurons = 2 * min(width, TILE_NEURONS) * D * FLOAT32_BYTES if work.keep_inputs else 0
    return Memory(
        {"one shared expert": (merged + begins) * BFLOAT16_BYTES, "tiles": tiles, "kept inputs": kept + neurons}
    )


def _capture(model: ModelSize, work: Workload, kind: str) -> Memory:
    passes, number, moe = work.train, work.number_bytes, model.moe
    stored = round(min(work.capture_tokens, passes.tokens)) * (
        128 * 16 + (3 * len(moe.layers) * moe.experts if work.stores_routers else 0)
    )
    return Memory(
        {**_weights(model, work, shared=False), "router outputs": _router_outputs(model, passes, number, number + 8)},
        {
            "forward": _forward(model, work, passes, shared=False),
            "vocabulary": {"vocabulary chunks": _chunks(model, work, passes, kind, LM_BUFFERS)},
        },
        {"chunk being written": stored},
    )


def _validate(model: ModelSize, work: Workload, kind: str) -> Memory:
    passes, number = work.validate, work.number_bytes
    chunks = _chunks(model, work, passes, kind, LM_BUFFERS)
    return Memory(
        {
            **_weights(model, work, shared=True),
            "router outputs": _router_outputs(model, passes, 3 * number, number + 8),
        },
        {"forward": _forward(model, work, passes, shared=True), "vocabulary": {"vocabulary chunks": chunks}},
    )


def _chunks(model: ModelSize, work: Workload, passes: Passes, kind: str, buffers: int) -> int:
    """Logits of as many tokens as are looked at together."""
    vocabulary = model.moe.vocabulary_size
    rows = max(1, min(CHUNK_ELEMENTS.get(kind, CHUNK_ELEMENTS["cpu"]) // vocabulary, passes.batch_tokens))
    narrow = work.number_bytes if work.number_bytes < FLOAT32_BYTES else 0
    return rows * vocabulary * (buffers * FLOAT32_BYTES + narrow)


def _loss_chunks(model: ModelSize, work: Workload, kind: str) -> int:
    """The larger of the two losses over the vocabulary, each over the rows of a micro-batch that are its own."""
    batch = work.train.batch
    kept, learnt = (math.ceil(batch * share) for share in (work.kept_share, 1 - work.kept_share))
    losses = {"lm": (learnt, LM_BUFFERS)}
    if "logits_kl" in work.losses:
        losses["logits_kl"] = (kept, KL_BUFFERS if work.teacher == "online" else LM_BUFFERS)
    return max(
        _chunks(model, work, replace(work.train, batch=rows), kind, buffers)
        for rows, buffers in losses.values()
        if rows
    )


def _train(model: ModelSize, work: Workload, kind: str) -> Memory:
    passes, number, moe, costs = work.train, work.number_bytes, model.moe, model.costs
    T, D, L = passes.batch_tokens, moe.hidden_size, model.layers
    neurons = work.width or moe.expert_width
    trained = trainable_numbers(model, work)
    masters = MASTER_BYTES if number < FLOAT32_BYTES else 0
    anchor = FLOAT32_BYTES if work.anchors else 0
    optimizer = trained * (MOMENT_BYTES + masters + anchor) // (work.processes if work.zero_stage else 1)
    gradients = trained * GRADIENT_BYTES // (work.processes if work.zero_stage >= 2 else 1)

    # Nothing below the first shared expert learns, so the first layer keeps only what that expert needs.
    deep = max(L - 1, 1)
    kept_layer = round(T * (costs.kept_numbers * number + costs.kept_bytes))
    kept_shared = round(T * costs.shared_numbers * neurons * number)
    kept_scores = _scores(model, work, passes, costs.kept_score_numbers)
    chunks = _loss_chunks(model, work, kind)
    # Final hidden states of student and teacher, those of tokens that count, and their gradient.
    final = 5 * T * D * number
    watched = "router_kl" in work.losses
    # Logits of both, of the tokens that count, and both softmaxes in float32 for the loss.
    routers = _router_outputs(model, passes, 4 * number + (8 if watched else 0), number + 8)
    if work.recomputes:
        kept = {"activations": L * T * D * number, "attention": 0}
        again = {"one layer computed again": kept_layer + kept_shared}
        scores = costs.score_numbers
    else:
        kept = {"activations": deep * kept_layer + L * kept_shared, "attention": deep * kept_scores}
        again = {}
        scores = costs.score_numbers - costs.kept_score_numbers
    # On the way back a layer's experts come first; when its attention does, what they had kept is gone.
    through_experts = {
        **kept,
        **again,
        "attention": kept["attention"] + (kept_scores if work.recomputes else 0),
        "one layer at work": round(T * costs.backward_numbers * number),
        **_decode_buffer(model, work),
    }
    through_attention = {
        "activations": kept["activations"] - (0 if work.recomputes else kept_layer + kept_shared),
        "attention": kept["attention"] + _scores(model, work, passes, scores),
        "one layer at work": round(T * costs.forward_numbers * number),
    }
    weights = _weights(model, work, shared=True)
    host = {}
    if work.offloads_optimizer:
        host["optimizer states, offloaded"] = optimizer + gradients
        optimizer = 0
    if work.zero_stage == 3:
        weights = {name: count // work.processes for name, count in weights.items()}
        if work.offload == "parameters":
            host |= {f"{name}, offloaded": count for name, count in weights.items()}
            # A layer is gathered while it is at work, and the next one beside it.
            weights = {"gathered layers": 2 * sum(weights.values()) * work.processes // L}
    return Memory(
        {
            **weights,
            "gradients": gradients,
            "optimizer states": optimizer,
            "router outputs": routers,
            "final hidden states": final,
        },
        {
            "teacher": _forward(model, work, passes, shared=False),
            "vocabulary": {**kept, "vocabulary chunks": chunks},
            "back through experts": through_experts,
            "back through attention": through_attention,
        },
        host,
    )


def trainable_numbers(model: ModelSize, work: Workload) -> int:
    """Parameters that training moves: shared experts, and the routers' changes if the router learns."""
    routers = len(model.moe.layers) * model.moe.experts * (model.moe.hidden_size + 1)
    return model.shared_numbers(work.width) + (routers if work.router_learns else 0)
