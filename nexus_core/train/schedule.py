"""Learning rate, temperature and what learns, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nexus_core.recipe.training import Train

Kind = Literal["deepseek_v3", "cosine", "constant"]
AfterFreeze = Literal["nothing", "weights"]


@dataclass(frozen=True)
class StepSettings:
    """What one optimizer step goes by.

    learning_rate: of shared experts and router weights; router biases get bias_lr_multiplier times as much. kl_scale:
    multiplies the weights of the losses that compare with the teacher. router_weights_learn, router_biases_learn: False
    once they are fixed; rules on the selection bias go with the biases.
    """

    learning_rate: float
    temperature: float
    kl_scale: float
    bias_lr_multiplier: float
    router_weights_learn: bool
    router_biases_learn: bool


@dataclass(frozen=True)
class Schedule:
    """The settings of every step, 1 to `steps`.

    Shapes of the learning rate: `deepseek_v3` rises linearly, stays, and falls as a cosine to its final ratio, which
    step `steps` has (source: DeepSeek-V3, arXiv 2412.19437, section 4.2); `cosine` is the same without the stay;
    `constant` is the full rate throughout. The temperature falls linearly from step anneal_start * steps to the last,
    whatever the shape. The router learns up to and including step bias_freeze_ratio * steps; with after_freeze
    `weights` its weights learn on and only its biases are fixed then.
    """

    kind: Kind
    steps: int
    learning_rate: float
    warmup_ratio: float = 0.5
    stable_ratio: float = 0.2
    final_lr_ratio: float = 0.1
    temperature: tuple[float, float] = (4.0, 2.0)
    anneal_start: float = 0.3
    kl_warmup: bool = False
    bias_lr_multiplier: float = 0.001
    bias_freeze_ratio: float = 0.5
    after_freeze: AfterFreeze = "nothing"

    @classmethod
    def of(cls, train: Train) -> Schedule:
        """The schedule that a recipe's `train` section asks for."""
        return cls(steps=train.max_steps, learning_rate=train.learning_rate, **train.schedule.model_dump())

    @property
    def warmup_steps(self) -> int:
        """Steps with a rising rate; the last of them has the full one."""
        return 0 if self.kind == "constant" else round(self.warmup_ratio * self.steps)

    @property
    def decay_start(self) -> int:
        """The last step at the full rate."""
        if self.kind == "constant":
            return self.steps
        stable = round(self.stable_ratio * self.steps) if self.kind == "deepseek_v3" else 0
        return min(self.warmup_steps + stable, self.steps)

    @property
    def last_bias_step(self) -> int:
        """The last step in which router biases learn, 0 for none."""
        return round(self.bias_freeze_ratio * self.steps)

    def at(self, step: int) -> StepSettings:
        """The settings of a step, counted from 1; the first step already learns."""
        is_before_freeze = step <= self.last_bias_step
        return StepSettings(
            learning_rate=self.learning_rate * self._rate(step),
            temperature=self._temperature(step),
            kl_scale=min(1.0, step / max(self.warmup_steps, 1)) if self.kl_warmup else 1.0,
            bias_lr_multiplier=self.bias_lr_multiplier,
            router_weights_learn=is_before_freeze or self.after_freeze == "weights",
            router_biases_learn=is_before_freeze,
        )

    def _rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step <= self.decay_start:
            return 1.0
        progress = (step - self.decay_start) / (self.steps - self.decay_start)
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    def _temperature(self, step: int) -> float:
        first, last = self.temperature
        start = self.anneal_start * self.steps
        if step <= start:
            return first
        return first + (last - first) * (step - start) / (self.steps - start)
