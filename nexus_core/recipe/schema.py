"""Every key a recipe may have, its type, its default and what it means.

Sections that choose a strategy (`select`, `convert`, `train.routing`) also take that strategy's own parameters beside
its name; `nexus_core.recipe.strategies` checks them against the strategy's parameter model. The
descriptions below are what docs/recipes.md is generated from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from nexus_core.recipe.sections import Count, Name, Section, StrategySection, Weight
from nexus_core.recipe.training import Train

# What a source's path begins with whose text the base writes itself.
GENERATED = "generated:"


class Model(Section):
    path: Name = Field(description="A model folder, a Hub id, or `embedded:NAME`.")
    revision: str | None = Field(None, description="Commit, branch or tag of a Hub id.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the computation; `auto` is float32 on CPU and bfloat16 on a GPU."
    )


class Records(Section):
    path: Name = Field(
        description="A file (jsonl, json, parquet, arrow, text), a folder of these or one that `datasets` saved, a Hub "
        "id, or `embedded:NAME`; see data.md."
    )
    format: str = Field("auto", description="Shape of a record; `auto` goes by the field names.")
    fields: dict[str, str] = Field({}, description="Which field plays which role, e.g. `{prompt: question}`.")
    config: str | None = Field(None, description="Configuration of a Hub data set.")
    split: str = Field("train", description="Split of a Hub data set or saved folder.")
    revision: str | None = Field(None, description="Commit, branch or tag of a Hub data set.")
    max_records: Count | None = Field(None, description="Read no more than this many records, the first as stored.")
    piece_characters: Annotated[int, Field(ge=50)] = Field(
        2_000, description="Running text: whole paragraphs up to so many characters make one record."
    )


class Source(Records):
    path: Name = Field(
        description="A file (jsonl, json, parquet, arrow, text), a folder of these or one that `datasets` saved, a Hub "
        "id, `embedded:NAME`, or `generated:NAME` for what the base itself writes (`generate.NAME`); see data.md."
    )
    weight: Weight = Field(1.0, description="Share of this source within its set, relative to the others'.")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="Share of records, chosen by a hash of what they ask, kept from training and used by `validate`.",
    )

    @property
    def generated(self) -> str | None:
        """The name under `generate` of the text it reads; None if it reads something else."""
        return self.path.removeprefix(GENERATED) if self.path.startswith(GENERATED) else None


class Generate(Section):
    prompts: Annotated[list[Records], Field(min_length=1)] = Field(
        description="What the base is given: prompts and conversations in its chat template, running text as it is."
    )
    max_new_tokens: Count = Field(512, description="Tokens written after a prompt, at most; longer ones are cut.")
    max_prompt_tokens: Count = Field(
        1024, description="Longer prompts are left out; of longer running text only the beginning is used."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="1 draws from the base's own distribution, 0 always takes its likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Draw from the likeliest tokens that together have this probability."
    )
    samples: Count = Field(1, description="Completions per prompt.")
    batch_size: Count = Field(16, description="Completions written at once.")
    seed: int = Field(0, description="Seed of the draws.")


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
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="What lies in parts on all processes: nothing at 0, the optimizer's numbers from 1, gradients from "
        "2, the base model from 3.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What lies in the machine's memory instead of the GPU's: the optimizer's numbers, or, at stage 3, "
        "the base model too.",
    )

    @model_validator(mode="after")
    def _offload_has_something_to_move(self) -> DeepSpeed:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload: {self.offload} moves what lies in parts from zero_stage {least} on, and zero_stage is "
                f"{self.zero_stage}; write zero_stage: {least}, or offload: none"
            )
        return self


class Run(Section):
    store: str = Field("runs", description="Folder of all stages' outputs.")
    device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`; `auto` is a GPU if there is one.")
    tracking: Tracking = Field(Tracking(), description="MLflow.")
    processes: Count = Field(
        1, description="Processes that share the work of `generate`, `collect`, `capture`, `train` and `validate`."
    )
    deepspeed: DeepSpeed | None = Field(
        None, description="DeepSpeed ZeRO for training; without it every process holds all there is."
    )


class Recipe(Section):
    schema_: Literal[1] = Field(alias="schema", description="Version of the recipe format: 1.")
    model: Model = Field(description="The base model.")
    data: dict[str, Annotated[list[Source], Field(min_length=1)]] = Field(
        description="Named sets of text, each a list of sources mixed by weight. The names are yours."
    )
    generate: dict[str, Generate] = Field(
        {}, description="Text that the base writes itself, by a name that sources of `data` give as `generated:NAME`."
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
    _locations: dict[str, str] = PrivateAttr(default_factory=dict)

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
    def trained_sets(self) -> tuple[str, ...]:
        """Names of the data sets that are trained on: all, unless `train.data` names some."""
        return tuple(self.train.data or self.data)

    @property
    def learnt_sets(self) -> tuple[str, ...]:
        """Names of the data sets to learn from."""
        if self.train.learn is not None:
            return tuple(self.train.learn)
        return self.trained_sets[:1]

    @property
    def kept_sets(self) -> tuple[str, ...]:
        """Names of the trained data sets that are to be kept as they are."""
        return tuple(name for name in self.trained_sets if name not in self.learnt_sets)
