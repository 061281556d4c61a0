"""What is compared: ways to build a shared expert, and ways to train without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nexus_core.distill.divergence import Direction

# lora: on attention and router; lora_experts: on attention and routed experts; full: everything but the output head.
Kind = Literal["shared", "full", "lora", "lora_experts", "router"]

GRIDS: Mapping[Kind, tuple[float, ...]] = {
    "shared": (5e-3, 1e-2, 2e-2),
    "lora": (5e-3, 1e-2, 2e-2),
    "lora_experts": (5e-3, 1e-2, 2e-2),
    "full": (5e-4, 1e-3, 2e-3),
    "router": (5e-3, 1e-2, 2e-2),
}


@dataclass(frozen=True)
class Subject:
    """One way to learn a domain; all but `kind` is for shared experts only.

    statistics: what the experts are selected by, both sets or the domain alone. merge, parameters, start: as in a
    recipe's convert section. rescaled: its rows of gate and up made as long as the experts' are on average.
    """

    kind: Kind = "shared"
    selection: str = "pca"
    top_k: int = 8
    statistics: Literal["both", "domain"] = "both"
    merge: str = "mean"
    parameters: tuple[tuple[str, Any], ...] = ()
    start: Literal["zero", "full"] | float = "zero"
    trains_router: bool = False
    rescaled: bool = False

    @property
    def uses_selection(self) -> bool:
        """Whether the shared expert depends on which experts are selected (random numbers have only their norms)."""
        if self.kind != "shared" or self.merge == "random":
            return False
        return self.merge != "neurons" or dict(self.parameters).get("pool") == "selected"

    @property
    def merge_label(self) -> str:
        """The merge with its parameters, e.g. `neurons, contrast 1`."""
        extra = "".join(f", {name} {value}" for name, value in self.parameters)
        return f"{self.merge}{extra}" + (", rescaled" if self.rescaled else "")

    @property
    def selection_label(self) -> str:
        """How the experts are selected, e.g. `pca 8`."""
        alone = " of the domain alone" if self.statistics == "domain" else ""
        return f"{self.selection} {self.top_k}{alone}"

    @property
    def label(self) -> str:
        """In words, for tables and pictures."""
        if self.kind != "shared":
            return {
                "full": "full fine-tuning",
                "lora": "LoRA, attention and router",
                "lora_experts": "LoRA, attention and experts",
                "router": "router only",
            }[self.kind]
        parts = [self.merge_label]
        if self.uses_selection:
            parts.append(self.selection_label)
        start = self.start if isinstance(self.start, str) else f"{self.start:g}"
        return "; ".join([*parts, f"{start} start"]) + (" + router" if self.trains_router else "")


@dataclass(frozen=True)
class Training:
    """One short training. Its key is the same in every process, so that finished ones are known again.

    length: how many times as long as a short one.
    """

    subject: Subject
    learning_rate: float
    domain: str = "arithmetic"
    seed: int = 0
    length: int = 1

    @property
    def key(self) -> str:
        longer = f" | {self.length} x" if self.length > 1 else ""
        subject = f"{self.subject.kind} | {self.subject.label}"
        return f"{self.domain} | {self.seed} | {subject} | {self.learning_rate:g}{longer}"


@dataclass(frozen=True)
class Result:
    """What a training came to, in nats per token of held-out text by set; `base` of the untouched model."""

    training: Training
    parameters: int
    seconds: float
    base: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """By how much the domain's loss fell."""
        domain = self.training.domain
        return self.base[domain] - self.after[domain]

    def forgotten(self, name: str) -> float:
        """By how much another set's loss rose."""
        return self.after[name] - self.base[name]

    @property
    def forgetting(self) -> float:
        """The mean rise of all other sets."""
        others = [name for name in self.base if name != self.training.domain]
        return sum(map(self.forgotten, others)) / len(others)

    @property
    def score(self) -> float:
        """What learning rates are chosen by: the gain less RETENTION_WEIGHT times what was forgotten."""
        return self.gain - RETENTION_WEIGHT * max(0.0, self.forgetting)

    def as_record(self) -> dict[str, Any]:
        """One line of the results."""
        return {"key": self.training.key, **asdict(self)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Result:
        """What `as_record` gave, after JSON has made lists of tuples."""
        training = dict(record["training"])
        subject = dict(training.pop("subject"))
        subject["parameters"] = tuple((name, value) for name, value in subject["parameters"])
        values = {name: record[name] for name in ("parameters", "seconds", "base", "after")}
        return cls(Training(Subject(**subject), **training), **values)


# The weight of the KL that holds the kept text, in these trainings and in the recipes; also what rates are chosen by.
RETENTION_WEIGHT = 4.0


@dataclass(frozen=True)
class Retention:
    """How the rest is held: kept text's share of the tokens, and the KL to the base on it."""

    weight: float = RETENTION_WEIGHT
    kept_share: float = 0.25
    direction: Direction = "forward"
