"""New bytes on disk by stage. The base's shards are linked, so they are not among them."""

from __future__ import annotations

from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.training import MASTER_BYTES, MOMENT_BYTES, trainable_numbers
from nexus_core.estimate.workload import BFLOAT16_BYTES, FLOAT32_BYTES, FLOAT64_BYTES, Workload

# Of a completion's record: its ids as digits, and its text. Chunks are joined before they go.
RECORD_BYTES_PER_TOKEN = 12


def stage_disk(model: ModelSize, work: Workload) -> dict[str, int]:
    """Bytes by stage."""
    layers, experts = len(model.moe.layers), model.moe.experts
    statistics = layers * (2 * experts**2 + 5 * experts) * FLOAT64_BYTES
    if work.gathers_neurons:
        statistics += layers * experts * model.moe.expert_width * work.data_sets * FLOAT64_BYTES
    kept = 2 * work.keep_inputs * layers * model.moe.hidden_size * FLOAT32_BYTES
    probabilities = 2 * work.keep_probabilities * layers * experts
    shared = BFLOAT16_BYTES * model.shared_numbers(work.width)
    # What is newest is written before what is oldest goes. The best state is the numbers alone.
    learnt = trainable_numbers(model, work)
    anchor = FLOAT32_BYTES if work.anchors else 0
    position = learnt * (MASTER_BYTES + MOMENT_BYTES + work.number_bytes % FLOAT32_BYTES + anchor)
    best = 2 * learnt * work.number_bytes if work.keeps_best else 0
    found = {
        "collect": statistics + kept + probabilities,
        "convert": shared,
        "train": shared + position * (work.checkpoints + 1) + best,
    }
    if work.generate:
        tokens = sum(text.count * (text.prompts.mean + text.new) for text in work.generate)
        found["generate"] = round(2 * RECORD_BYTES_PER_TOKEN * tokens)
    if work.teacher == "offline":
        routers = layers * (experts + 2) if work.stores_routers else 0
        found["capture"] = round(work.train.tokens * (work.kept_share * work.teacher_bytes_per_token + routers))
    return found
