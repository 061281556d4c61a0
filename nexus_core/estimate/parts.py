"""What the memory of stages is made of: weights, a layer at work, logits, what NEXUS hears.

# L layers, E experts, K experts per token, T tokens of a micro-batch, S sequence length, D hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nexus_core.distill.vocabulary import CHUNK_ELEMENTS
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.workload import FLOAT32_BYTES, Passes, Workload

# The part that is mapped from its files where the device is the host.
MAPPED = "packed experts"

# oneDNN compiles bfloat16 products for every shape and keeps 1,024 of them: measured at 0.68 MB each, for 20 rows as
# for 200 (AMD EPYC with avx512_bf16). An expert that has most rows has about three times the mean.
KERNEL_BYTES = 680_000
MOST_KERNELS = 1024
UNEVEN_ROWS = 3.0

# Of an expert: two on the way forward, two on the way back.
FORWARD_PRODUCTS = 2
TRAINING_PRODUCTS = 4

# Buffers of a chunk of float32 logits: student, teacher, and one between them; only the student's without a teacher.
# Logits in bfloat16 are gone when the last of them is made.
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


def held_weights(model: ModelSize, work: Workload, *, shared: bool) -> dict[str, int]:
    own = model.moe.shared_expert_width
    others = model.costs.held_numbers - (model.shared_numbers(own) if own else 0)
    return {
        MAPPED: model.costs.packed_bytes,
        "other weights": others * work.number_bytes,
        "shared experts": model.shared_numbers(work.width) * work.number_bytes if shared else 0,
    }


def decode_buffer(model: ModelSize, work: Workload) -> dict[str, int]:
    return {"decode buffer": model.costs.buffer_numbers * work.number_bytes}


def attention_scores(model: ModelSize, work: Workload, passes: Passes, numbers: float) -> int:
    """One layer's attention scores; none where its kernel writes none down."""
    costs = model.costs
    if costs.score_tokens is not None and passes.length > costs.score_tokens:
        return 0
    return round(numbers * costs.heads * passes.batch * passes.length**2 * work.number_bytes)


def layer_forward(model: ModelSize, work: Workload, passes: Passes, *, shared: bool) -> dict[str, int]:
    """One layer on the way forward: the larger of its attention and its experts, which are not at the same time."""
    neurons = (work.width or model.moe.expert_width) if shared else 0
    costs = model.costs
    return {
        "attention": attention_scores(model, work, passes, costs.score_numbers),
        "one layer at work": layer_bytes(
            work, passes, costs.forward_numbers + costs.shared_numbers * neurons, costs.sliced_forward
        ),
        **decode_buffer(model, work),
    }


def layer_bytes(work: Workload, passes: Passes, per_token: float, sliced: Sequence[tuple[float, float]]) -> int:
    """Numbers for each token, and those that are held for some tokens at a time only."""
    numbers = passes.batch_tokens * per_token
    numbers += sum(min(tokens, passes.batch_tokens) * each for tokens, each in sliced)
    return round(numbers * work.number_bytes)


def compiled_products(model: ModelSize, work: Workload, passes: Passes, kind: str, products: int) -> dict[str, int]:
    """What a CPU's library keeps of products in bfloat16: a compiled kernel for every number of rows that an expert
    has been seen with. products: of an expert with a row.
    """
    if kind != "cpu" or work.number_bytes == FLOAT32_BYTES:
        return {}
    moe = model.moe
    most_rows = UNEVEN_ROWS * passes.batch_tokens * moe.experts_per_token / moe.experts
    layers = len(moe.layers) * max(passes.tokens // max(passes.batch_tokens, 1), 1)
    shapes = products * min(most_rows, layers * moe.experts, passes.batch_tokens)
    return {"compiled products": round(min(shapes, MOST_KERNELS) * KERNEL_BYTES)}


def router_outputs(model: ModelSize, passes: Passes, per_expert: float, per_choice: float) -> int:
    moe = model.moe
    per_token = moe.experts * per_expert + moe.experts_per_token * per_choice
    return round(len(moe.layers) * passes.batch_tokens * per_token)


def vocabulary_chunks(model: ModelSize, passes: Passes, kind: str, buffers: int) -> int:
    """Logits of as many tokens as are looked at together."""
    vocabulary = model.moe.vocabulary_size
    rows = max(1, min(CHUNK_ELEMENTS.get(kind, CHUNK_ELEMENTS["cpu"]) // vocabulary, passes.batch_tokens))
    return rows * vocabulary * buffers * FLOAT32_BYTES
