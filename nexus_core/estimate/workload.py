"""What a recipe asks of a model, in numbers: micro-batches, steps, types, how training is spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nexus_core.recipe.schema import Recipe

FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2
FLOAT64_BYTES = 8


@dataclass(frozen=True)
class Passes:
    """A stage's forward passes: `batch` sequences of `length` tokens at a time, `tokens` altogether."""

    tokens: int
    batch: int
    length: int

    @property
    def batch_tokens(self) -> int:
        """T: tokens that go through the model at once."""
        return self.batch * self.length


@dataclass(frozen=True)
class Prompts:
    """How many there are, and tokens of the longest and on average. is_all: whether there can be no more."""

    count: int
    longest: int
    mean: float
    is_all: bool = True


@dataclass(frozen=True)
class Completions:
    """Text that the base writes: `count` completions, `batch` at a time, each of at most `new` tokens. name: under the
    recipe's `generate`. sorts: whether only the likeliest tokens are drawn from.
    """

    name: str
    prompts: Prompts
    count: int
    batch: int
    new: int
    sorts: bool = False


@dataclass(frozen=True)
class Workload:
    """A recipe's numbers. number_bytes: of the type it computes in, on the device in question.

    kept_share: of training text that is kept, not learnt.  chosen: experts that a shared expert is made of.
    capture_tokens: that `capture` writes at once. processes, zero_stage, offload: as `run` of a recipe. accumulation:
    micro-batches of a step, of all processes together. generate: empty where the recipe has no such stage.
    """

    number_bytes: int
    collect: Passes
    train: Passes
    validate: Passes
    steps: int
    width: int | None
    chosen: int
    keep_inputs: int
    gathers_neurons: bool
    keep_probabilities: int
    losses: frozenset[str]
    router_learns: bool
    kept_share: float
    recomputes: bool
    anchors: bool
    keeps_best: bool
    teacher: str
    teacher_bytes_per_token: float
    stores_routers: bool
    checkpoints: int
    data_sets: int
    capture_tokens: int
    processes: int = 1
    zero_stage: int = 0
    offload: str = "none"
    accumulation: int = 1
    generate: tuple[Completions, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether DeepSpeed trains: at stage 0 nothing is in parts, and alone nothing but what is offloaded."""
        return self.offloads_optimizer or (self.zero_stage > 0 and self.processes > 1)

    @property
    def own_accumulation(self) -> int:
        """Micro-batches of a step that one process computes: the step's rows are dealt out."""
        return math.ceil(self._own_rows / self.train.batch)

    @property
    def own_train(self) -> Passes:
        """Training's micro-batches as one process computes them."""
        return replace(self.train, batch=math.ceil(self._own_rows / self.own_accumulation))

    @property
    def _own_rows(self) -> int:
        return math.ceil(self.train.batch * self.accumulation / self.processes)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's numbers lie in the machine's memory."""
        return self.offload != "none"

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        kind: str,
        *,
        gathers_neurons: bool,
        router_learns: bool,
        capture_tokens: int,
        prompts: Mapping[str, Prompts] | None = None,
    ) -> Workload:
        """The recipe's, on a device of `kind` ("cpu" or "cuda"). gathers_neurons, router_learns: what its strategies
        need; capture_tokens: of a chunk of a stored teacher: see the stages. prompts: by name under
        `generate`, if the recipe has that stage.
        """
        collect, train, validate = recipe.collect, recipe.train, recipe.validate_
        is_narrow = recipe.model.dtype == "bfloat16" or (recipe.model.dtype == "auto" and kind != "cpu")
        per_step = train.batch_size * train.gradient_accumulation * train.sequence_length
        probabilities = collect.keep_probabilities
        keep = collect.tokens if probabilities is True else int(probabilities)
        zero = recipe.run.deepspeed
        return cls(
            number_bytes=BFLOAT16_BYTES if is_narrow else FLOAT32_BYTES,
            collect=Passes(collect.tokens, collect.batch_size, collect.sequence_length),
            train=Passes(train.max_steps * per_step, train.batch_size, train.sequence_length),
            validate=Passes(
                validate.samples * validate.sequence_length * len(recipe.data),
                validate.batch_size,
                validate.sequence_length,
            ),
            steps=train.max_steps,
            width=recipe.convert.width,
            chosen=_chosen(recipe.select.top_k),
            keep_inputs=collect.keep_inputs,
            gathers_neurons=gathers_neurons or collect.expert_norms,
            keep_probabilities=min(keep, collect.tokens),
            losses=frozenset(name for name, weight in train.loss_weights.items() if weight > 0),
            router_learns=router_learns,
            kept_share=_kept_share(recipe),
            recomputes=train.recomputes_on(kind),
            anchors=train.anchor is not None,
            keeps_best=train.evaluate.every is not None,
            teacher=train.teacher.kind,
            teacher_bytes_per_token=train.teacher.bytes_per_token,
            stores_routers=train.teacher.stores_routers,
            checkpoints=train.keep_checkpoints,
            data_sets=len(recipe.data),
            capture_tokens=capture_tokens,
            processes=recipe.run.processes,
            zero_stage=zero.zero_stage if zero else 0,
            offload=zero.offload if zero else "none",
            accumulation=train.gradient_accumulation,
            generate=tuple(_completions(recipe, name, found) for name, found in (prompts or {}).items()),
        )


def _completions(recipe: Recipe, name: str, prompts: Prompts) -> Completions:
    item = recipe.generate[name]
    count = prompts.count * item.samples
    return Completions(
        name,
        prompts,
        count,
        min(item.batch_size, count) if prompts.is_all and count else item.batch_size,
        item.max_new_tokens,
        sorts=item.top_p < 1 and item.temperature > 0,
    )


def _chosen(top_k: object) -> int:
    """Experts per layer; of rules that decide by the statistics, about as many as they choose."""
    if isinstance(top_k, int):
        return top_k
    return max(top_k) if isinstance(top_k, list) else 8


def _kept_share(recipe: Recipe) -> float:
    shares: Mapping[str, float] = recipe.train.data or dict.fromkeys(recipe.data, 1.0)
    return sum(shares[name] for name in recipe.kept_sets) / sum(shares.values())
