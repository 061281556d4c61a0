"""The `train` section of a recipe, and everything below it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nexus_core.recipe.sections import Count, Name, Ratio, Section, StrategySection, Weight


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
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, one more forward pass. `auto` does on a "
        "GPU, and not on a CPU.",
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

    def recomputes_on(self, device_type: str, *, is_possible: bool = True) -> bool:
        """Whether activations are recomputed on a kind of device, "cpu" or "cuda"; is_possible: by the model."""
        if self.gradient_checkpointing == "auto":
            return is_possible and device_type != "cpu"
        return self.gradient_checkpointing

    @property
    def loss_parameters(self) -> dict[str, dict[str, Any]]:
        """Each loss's own parameters by its name."""
        return {name: loss.parameters if isinstance(loss, Loss) else {} for name, loss in self.losses.items()}
