"""Every key a recipe may have, its type, its default and what it means.

Sections that choose a strategy (`select`, `convert`, `train.routing`) also take that strategy's own parameters beside
its name; `nexus_core.recipe.strategies` checks them against the strategy's parameter model. The
descriptions below are what docs/recipes.md is generated from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, types are exact, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StrategySection(Section):
    """A part that chooses a strategy: keys beside the ones below are that strategy's parameters."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """The chosen strategy's own parameters, defaults filled in once the recipe has been loaded."""
        return dict(self.__pydantic_extra__ or {})


class Model(Section):
    path: Name = Field(description="A model folder, a Hub id, or `embedded:NAME`.")
    revision: str | None = Field(None, description="Commit, branch or tag of a Hub id.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the computation; `auto` is float32 on CPU and bfloat16 on a GPU."
    )


class Source(Section):
    path: Name = Field(
        description="A file (jsonl, json, parquet, arrow, text), a folder of these or one that `datasets` saved, a Hub "
        "id, or `embedded:NAME`; see data.md."
    )
    weight: Weight = Field(1.0, description="Share of this source within its set, relative to the others'.")
    format: str = Field("auto", description="Shape of a record; `auto` goes by the field names.")
    fields: dict[str, str] = Field({}, description="Which field plays which role, e.g. `{prompt: question}`.")
    config: str | None = Field(None, description="Configuration of a Hub data set.")
    split: str = Field("train", description="Split of a Hub data set or saved folder.")
    revision: str | None = Field(None, description="Commit, branch or tag of a Hub data set.")
    max_records: Count | None = Field(None, description="Read no more than this many records, the first as stored.")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="Share of records, chosen by a hash of what they ask, kept from training and used by `validate`.",
    )


class Sampling(Section):
    strategy: Literal["coverage", "uniform", "kl_greedy"] = Field(
        "coverage",
        description="How records are drawn: so that they use the vocabulary as all candidates do, by lot, or by the "
        "first published rule (for comparison).",
    )
    candidates: Count = Field(10_000, description="Records per set to draw from.")


class Collect(Section):
    data: dict[str, Weight] | None = Field(None, description="Share of each data set by name; all equally if left out.")
    tokens: Count = Field(1_000_000, description="Tokens to route.")
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens per sequence.")
    batch_size: Count = Field(8, description="Sequences per forward pass.")
    sampling: Sampling = Field(Sampling(), description="How records are drawn from the data.")
    keep_inputs: Annotated[int, Field(ge=0)] = Field(
        256, description="MoE inputs kept per layer, so that `convert` can tell what its start does."
    )
    expert_norms: bool = Field(
        False,
        description="Also gather what experts put out (gate weight x norm) and the saliency of every neuron, about "
        "twice the work; switched on by itself where a chosen strategy needs it.",
    )
    keep_probabilities: bool | Count = Field(
        False, description="Also write router probabilities as NPZ: all of them, or those of the first N tokens."
    )
    seed: int = Field(0, description="Seed of the draw.")


class Cumulative(Section):
    cumulative: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Take the fewest experts that together hold this share of a layer's importance."
    )


class Select(StrategySection):
    strategy: str = Field("pca", description="How a layer's experts are ranked.")
    top_k: Count | Literal["auto"] | Cumulative | Annotated[list[Count], Field(min_length=1)] = Field(
        "auto",
        description="Experts per layer: one number, a list with one per layer in their order, `auto` by the importance "
        "that the top 4 hold, or `{cumulative: 0.8}`.",
    )
    seed: int = Field(0, description="Seed of strategies that draw.")


class Convert(StrategySection):
    merge: str = Field("mean", description="How the chosen experts become one.")
    width: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Neurons of the shared expert, any number; one routed expert's width if left out."
    )
    start: Literal["zero", "full"] | float = Field(
        "zero",
        description="First output: `zero` keeps the model's function, `full` adds the merged expert, or a factor.",
    )
    seed: int = Field(0, description="Seed of strategies that draw.")


class Teacher(Section):
    kind: Literal["online", "offline"] = Field(
        "online",
        description="`online`: the same weights with the shared experts off; `offline`: stored once by `capture`.",
    )
    top_logits: Annotated[int, Field(ge=1, le=255)] = Field(
        128, description="Offline: tokens of the vocabulary stored per kept token, at most."
    )
    tail: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.005, description="Offline: fewer are stored where all others together are less likely than this."
    )
    bytes_per_token: Annotated[float, Field(ge=16)] = Field(
        120.0, description="Offline: room for them on average; where it is too little, `tail` is raised."
    )
    routers: bool = Field(True, description="Offline: also store router logits, which `router_kl` needs.")
    path: Name | None = Field(
        None, description="Offline: another model to learn from, with the same vocabulary; the base if left out."
    )
    revision: str | None = Field(None, description="Commit, branch or tag of that model.")

    @model_validator(mode="after")
    def _only_a_stored_teacher_is_another_model(self) -> Teacher:
        if self.path is not None and self.kind == "online":
            raise ValueError(f"path {self.path} names another model, which must be captured: write kind: offline")
        return self

    @property
    def stores_routers(self) -> bool:
        """Whether router logits are stored; another model's routers are not the student's."""
        return self.routers and self.path is None


class Routing(StrategySection):
    strategy: str = Field("frozen", description="What of the router learns.")


class Schedule(Section):
    kind: Literal["deepseek_v3", "cosine", "constant"] = Field(
        "deepseek_v3", description="Shape of the learning rate over the steps."
    )
    warmup_ratio: Ratio = Field(0.5, description="Share of the steps with a linearly rising rate.")
    stable_ratio: Ratio = Field(0.2, description="Share of the steps at the full rate, before the cosine.")
    final_lr_ratio: Ratio = Field(0.1, description="Rate at the end, as a share of the full rate.")
    temperature: tuple[float, float] = Field((4.0, 2.0), description="Distillation temperature, first and last.")
    anneal_start: Ratio = Field(0.3, description="Share of the steps before the temperature starts to fall.")
    kl_warmup: bool = Field(False, description="Raise the weights of the KL losses during the warm-up too.")
    bias_lr_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.001, description="Learning rate of router biases, as a share of the rest's; matters when the router trains."
    )
    bias_freeze_ratio: Ratio = Field(
        0.5, description="Share of the steps after which the router stops learning; matters when the router trains."
    )

    after_freeze: Literal["nothing", "weights"] = Field(
        "nothing", description="What of the router learns on after that: nothing, or its weights without its biases."
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_pair(cls, value: Any) -> Any:
        # YAML has no tuples; strict mode would refuse the list.
        if isinstance(value, dict) and isinstance(value.get("temperature"), list):
            value = {**value, "temperature": tuple(value["temperature"])}
        return value

    @model_validator(mode="after")
    def _phases_fit(self) -> Schedule:
        if self.kind == "deepseek_v3" and self.warmup_ratio + self.stable_ratio > 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and stable_ratio {self.stable_ratio} add up to more than 1"
            )
        if min(self.temperature) <= 0:
            raise ValueError(f"temperature {list(self.temperature)} must be above 0")
        return self


class Loss(StrategySection):
    weight: Annotated[float, Field(ge=0)] = Field(description="Weight in the sum of all losses.")


class Evaluate(Section):
    every: Count | None = Field(
        None, description="Steps between measurements on held-out text, step 0 too; none if left out."
    )
    sequences: Count = Field(32, description="Held-out sequences per data set, at most.")
    keep: Literal["best", "last"] = Field(
        "best", description="Which state becomes the model: the best on held-out text, or the last."
    )
    patience: Count | None = Field(
        None, description="Stop after so many measurements without a better one; never if left out."
    )

    @model_validator(mode="after")
    def _patience_needs_measurements(self) -> Evaluate:
        if self.patience is not None and self.every is None:
            raise ValueError(f"patience {self.patience} counts measurements, and there are none without `every`")
        return self


class Anchor(Section):
    interval: Count = Field(250, description="Steps between averages.")
    alpha: Ratio = Field(0.25, description="Share of the earlier state in the average.")


class Train(Section):
    teacher: Teacher = Field(Teacher(), description="Where the base's outputs come from.")
    routing: Routing = Field(Routing(), description="What of the router learns.")
    data: dict[str, Weight] | None = Field(
        None, description="Share of each data set by name; all equally if left out. See `learn` for what each is for."
    )
    learn: list[str] | None = Field(
        None,
        description="Data sets to learn from (language-model loss); the others are kept (KL to the base). "
        "The first name under `train.data` if left out.",
    )
    losses: dict[str, Annotated[float, Field(ge=0)] | Loss] = Field(
        {"lm": 1.0, "router_kl": 1.0, "logits_kl": 4.0},
        description="Each loss by name: its weight, or `{weight: 4.0}` with parameters of its own beside it.",
    )
    schedule: Schedule = Field(Schedule(), description="Learning rate and temperature over the steps.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1.0e-5, description="Full learning rate of AdamW.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay of AdamW.")
    max_gradient_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    max_steps: Count = Field(10_000, description="Optimizer steps.")
    sequence_length: Annotated[int, Field(ge=8)] = Field(1024, description="Tokens per sequence.")
    batch_size: Count = Field(1, description="Sequences per micro-batch.")
    gradient_accumulation: Count = Field(4, description="Micro-batches per step.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, one more forward pass."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A step whose loss or gradient is not finite ends the run, or is left out."
    )
    evaluate: Evaluate = Field(Evaluate(), description="Held-out text during training: best state, early stop.")
    anchor: Anchor | None = Field(
        None, description="Rolling average of the weights with an earlier state of themselves; none if left out."
    )
    start_from: str | None = Field(
        None, description="Folder of an earlier run's `train` (or its model): begin with what it had learnt."
    )
    checkpoint_every: Count = Field(500, description="Steps between checkpoints.")
    keep_checkpoints: Count = Field(2, description="Newest checkpoints kept.")
    seed: int = Field(0, description="Seed of the order of the data.")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of every loss by name."""
        return {name: loss.weight if isinstance(loss, Loss) else loss for name, loss in self.losses.items()}

    @property
    def loss_parameters(self) -> dict[str, dict[str, Any]]:
        """Each loss's own parameters by its name."""
        return {name: loss.parameters if isinstance(loss, Loss) else {} for name, loss in self.losses.items()}


class Validate(Section):
    samples: Count = Field(1000, description="Held-out sequences per data set, at most.")
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens per sequence.")
    batch_size: Count = Field(8, description="Sequences per forward pass.")
    max_perplexity_increase: Annotated[float, Field(ge=0)] = Field(
        0.05, description="Rise of perplexity, as a share, that a kept set may show before the verdict is negative."
    )


class Tracking(Section):
    enabled: bool = Field(True, description="Record the run in MLflow.")
    uri: str | None = Field(None, description="MLflow tracking URI; an sqlite file in the run store if left out.")
    experiment: str = Field("nexus", description="MLflow experiment.")


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage.")


class Run(Section):
    store: str = Field("runs", description="Folder of all stages' outputs.")
    device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`; `auto` is a GPU if there is one.")
    tracking: Tracking = Field(Tracking(), description="MLflow.")
    processes: Count = Field(1, description="Processes to train with.")
    deepspeed: DeepSpeed | None = Field(None, description="DeepSpeed ZeRO, for more than one process.")


class Recipe(Section):
    schema_: Literal[1] = Field(alias="schema", description="Version of the recipe format: 1.")
    model: Model = Field(description="The base model.")
    data: dict[str, Annotated[list[Source], Field(min_length=1)]] = Field(
        description="Named sets of text, each a list of sources mixed by weight. The names are yours."
    )
    collect: Collect = Field(Collect(), description="Router statistics over a mix of the data.")
    select: Select = Field(Select(), description="Which experts the shared expert is built from.")
    convert: Convert = Field(Convert(), description="How it is built.")
    train: Train = Field(Train(), description="Distillation of the shared experts.")
    validate_: Validate = Field(Validate(), alias="validate", description="What was gained, what was forgotten.")
    run: Run = Field(Run(), description="How to execute; never part of a stage's key.")

    # Where the recipe came from: set by the loader, not keys of the file.
    _name: str = "recipe"
    _folder: Path = Path()
    _text: str = ""
    _locations: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The recipe file's name without its ending."""
        return self._name

    @property
    def folder(self) -> Path:
        """Where the recipe file lies."""
        return self._folder

    @property
    def text(self) -> str:
        """The recipe file as it was read."""
        return self._text

    def location(self, key: str) -> str:
        """`file:line:column` of a key's value, e.g. of `select.top_k`; of its section where it was left out."""
        while key and key not in self._locations:
            key = key.rpartition(".")[0]
        return self._locations.get(key, self._name)

    @property
    def learnt_sets(self) -> tuple[str, ...]:
        """Names of the data sets to learn from."""
        if self.train.learn is not None:
            return tuple(self.train.learn)
        return tuple(self.train.data or self.data)[:1]

    @property
    def kept_sets(self) -> tuple[str, ...]:
        """Names of the trained data sets that are to be kept as they are."""
        return tuple(name for name in (self.train.data or self.data) if name not in self.learnt_sets)
