"""Memory of every stage by part: what stays for the whole stage, and the fullest of the moments that come and go.

# L layers, E experts, K experts per token, T tokens of a micro-batch, S sequence length, D hidden size, V vocabulary
"""

from __future__ import annotations

import math

from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.parts import (
    FORWARD_PRODUCTS,
    LM_BUFFERS,
    MAPPED,
    UNEVEN_ROWS,
    Memory,
    compiled_products,
    held_weights,
    layer_forward,
    router_outputs,
    vocabulary_chunks,
)
from nexus_core.estimate.training import train_memory
from nexus_core.estimate.workload import BFLOAT16_BYTES, FLOAT32_BYTES, FLOAT64_BYTES, Completions, Passes, Workload
from nexus_core.merge.effect import TILE_NEURONS
from nexus_core.merge.experts import TILE_NUMBERS

# Python, torch and transformers, imported, with a tokenizer and some text; a GPU's libraries take more of the host.
PROGRAM_BYTES = {"cpu": 300_000_000, "cuda": 3_000_000_000}

# What lives at once for each token of the vocabulary while the next one is drawn: its logit, as computed and twice in
# float32, its probability and the sum up to it in float64; and with `top_p` what sorts them.
DRAW_BYTES = 24
TOP_P_BYTES = 40

# A picture while it is drawn and written.
PICTURE_BYTES = 5_000_000

# For each token and expert in float64, while a layer's probabilities are added up.
MOMENT_NUMBERS = 3

# Records, their tokens and what they are chosen by, before there are sequences: of data sets of a few megabytes.
TEXT_BYTES = 8_000_000


def stage_memory(model: ModelSize, work: Workload, kind: str) -> dict[str, Memory]:
    """Memory by stage on a device of `kind`, "cpu" or "cuda"; on a CPU the device is the host."""
    found = {
        "collect": _collect(model, work, kind),
        "select": Memory({"router statistics": _moments(model, work)}),
        "convert": _convert(model, work),
        "train": train_memory(model, work, kind),
        "validate": _validate(model, work, kind),
    }
    if work.generate:
        found["generate"] = _generate(model, work, kind)
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


def _moments(model: ModelSize, work: Workload) -> int:
    """Router statistics: two matrices and five vectors a layer, and what each neuron does, if that is gathered."""
    layers, experts = len(model.moe.layers), model.moe.experts
    sums = layers * (2 * experts**2 + 5 * experts) * FLOAT64_BYTES
    neurons = layers * experts * model.moe.expert_width * work.data_sets * FLOAT64_BYTES
    return sums + (neurons if work.gathers_neurons else 0)


def _kept_inputs(model: ModelSize, work: Workload) -> int:
    return 2 * work.keep_inputs * len(model.moe.layers) * model.moe.hidden_size * FLOAT32_BYTES


def _collect(model: ModelSize, work: Workload, kind: str) -> Memory:
    """What is heard of a layer is added up before the next one runs; only probabilities to be kept wait for all."""
    passes, number, moe = work.collect, work.number_bytes, model.moe
    T, layers = passes.batch_tokens, max(len(moe.layers), 1)
    of_layer = router_outputs(model, passes, number, number + 8) // layers
    waiting = layers * T * moe.experts * number if work.keep_probabilities else 0
    # What went into the layer's experts and came out of them.
    heard = 2 * T * moe.hidden_size * number if work.keep_inputs or work.gathers_neurons else 0
    adding = MOMENT_NUMBERS * moe.experts * T * FLOAT64_BYTES
    if work.gathers_neurons:
        adding = max(adding, _neurons_heard(model, work))
    lasting = {
        **held_weights(model, work, shared=False),
        "router statistics": _moments(model, work),
        "router outputs": of_layer + waiting,
        **compiled_products(model, work, passes, kind, FORWARD_PRODUCTS),
    }
    # Ids, positions and data set of every token, and what reading and drawing them takes.
    text = TEXT_BYTES + 24 * work.collect.tokens
    return Memory(
        lasting,
        {
            "forward": layer_forward(model, work, passes, shared=False),
            "adding up": {"layer inputs heard": heard, "one layer added up": adding},
        },
        {"inputs kept for convert": _kept_inputs(model, work), "text": text},
    )


def _neurons_heard(model: ModelSize, work: Workload) -> int:
    """Of an expert, dense: its matrices, one of them in float64 too, and the rows of the one that has most."""
    D, F = model.moe.hidden_size, model.moe.expert_width
    rows = UNEVEN_ROWS * work.collect.batch_tokens * model.moe.experts_per_token / model.moe.experts
    matrices = 3 * D * F * work.number_bytes + D * F * FLOAT64_BYTES
    return round(matrices + rows * (2 * D + 3 * F) * work.number_bytes + rows * (D + 2 * F) * FLOAT64_BYTES)


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
        {
            "one shared expert": (merged + begins) * BFLOAT16_BYTES,
            "tiles": tiles,
            "kept inputs": kept + neurons,
            "picture": PICTURE_BYTES if work.keep_inputs else 0,
        }
    )


def _capture(model: ModelSize, work: Workload, kind: str) -> Memory:
    model = model.teacher or model
    passes, number, moe = work.train, work.number_bytes, model.moe
    stored = round(min(work.capture_tokens, passes.tokens)) * (
        128 * 16 + (3 * len(moe.layers) * moe.experts if work.stores_routers else 0)
    )
    # Logits of all layers in float32, and the same side by side.
    layered = 2 * len(moe.layers) * passes.batch_tokens * moe.experts * FLOAT32_BYTES if work.stores_routers else 0
    return Memory(
        {
            **held_weights(model, work, shared=False),
            "router outputs": router_outputs(model, passes, number, number + 8),
            **compiled_products(model, work, passes, kind, FORWARD_PRODUCTS),
        },
        {
            "forward": layer_forward(model, work, passes, shared=False),
            "vocabulary": {"vocabulary chunks": vocabulary_chunks(model, passes, kind, LM_BUFFERS)},
            "storing": {"router logits to be stored": layered},
        },
        {"chunk being written": stored},
    )


def _generate(model: ModelSize, work: Workload, kind: str) -> Memory:
    """Of the list of text that needs most: weights are the same for all."""
    return max((_complete(model, work, text, kind) for text in work.generate), key=lambda memory: memory.device_bytes)


def _complete(model: ModelSize, work: Workload, text: Completions, kind: str) -> Memory:
    number, vocabulary, longest = work.number_bytes, model.moe.vocabulary_size, text.prompts.longest
    # A window's layers keep no more keys and values than it sees.
    seen = sum(min(longest + text.new, window or math.inf) for window in model.costs.windows)
    cache = round(text.batch * seen * model.cached_numbers * number)
    draw = DRAW_BYTES + number + (TOP_P_BYTES if text.sorts else 0)
    prompts = Passes(text.batch * longest, text.batch, longest)
    return Memory(
        {
            **held_weights(model, work, shared=False),
            "keys and values": cache,
            **compiled_products(model, work, prompts, kind, FORWARD_PRODUCTS),
        },
        {
            "prompts": layer_forward(model, work, prompts, shared=False),
            "drawing": {"vocabulary chunks": text.batch * vocabulary * draw},
        },
    )


def _validate(model: ModelSize, work: Workload, kind: str) -> Memory:
    passes, number = work.validate, work.number_bytes
    chunks = vocabulary_chunks(model, passes, kind, LM_BUFFERS)
    return Memory(
        {
            **held_weights(model, work, shared=True),
            "router outputs": router_outputs(model, passes, 3 * number, number + 8),
            **compiled_products(model, work, passes, kind, FORWARD_PRODUCTS),
        },
        {"forward": layer_forward(model, work, passes, shared=True), "vocabulary": {"vocabulary chunks": chunks}},
    )
