"""The nouns that core, stages and plugins share. Imports nothing heavy; tensors are torch tensors.

Legend for shapes, used throughout: L layers, E experts, K experts per token, T tokens, S sequence length, B batch,
D hidden size, F expert width (neurons), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import nn


@dataclass(frozen=True)
class MoeDescription:
    """What core needs to know of a mixture-of-experts model, from its config alone.

    layers: indices of the decoder layers that hold routed experts, ascending; dense layers are left out.
    storage: how routed experts lie on disk, for people ("mxfp4", "bfloat16").
    weights_sum_to_one: whether the gate weights of a token's K experts sum to 1 (the exact fold needs it).
    shared_expert_width: neurons of the shared expert NEXUS added, 0 in an untouched base.
    """

    family: str
    model_type: str
    layers: tuple[int, ...]
    experts: int
    experts_per_token: int
    hidden_size: int
    expert_width: int
    vocabulary_size: int
    storage: str
    weights_sum_to_one: bool
    has_expert_biases: bool
    shared_expert_width: int = 0


@dataclass(frozen=True)
class TensorPart:
    """A tensor on disk, or one slice of its first dimension: `name[index]`; index None is the whole tensor."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class ExpertLocation:
    """Where one routed expert's numbers lie in a checkpoint."""

    layer: int
    expert: int
    parts: tuple[TensorPart, ...]


@dataclass
class ExpertWeights:
    """One expert in canonical layout: gate (F, D), up (F, D), down (D, F), biases (F,), (F,), (D,) or None.

    Its function is down @ activation(gate @ x + gate_bias, up @ x + up_bias) + down_bias, the activation being the
    family's. Rows of gate and up and columns of down with the same index are one neuron.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """F, the number of neurons."""
        return self.gate.shape[0]


@dataclass(frozen=True)
class MoeBlock:
    """The modules of one layer that core listens to.

    block: called with hidden states (B, S, D) or (T, D); its output, or the first item of its output tuple, is what
    the layer adds to the residual stream. router: its forward output is passed to `nexus_router_logits`.
    """

    layer: int
    block: nn.Module
    router: nn.Module


@dataclass(frozen=True)
class RouterOutput:
    """A router's decision for T tokens: logits (T, E) before top-k, weights (T, K) after it, indices (T, K)."""

    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True)
class RunningCosts:
    """What holding a model and running it takes, from its config alone: what `nexus check` adds up.

    Counted in numbers, whose size is that of the type it computes in, where the name does not say bytes.

    packed_bytes: of routed experts that stay as they are stored, whatever it computes in; 0 if none do. held_numbers:
    of all other tensors. layer_products: numbers of matrices that every token is multiplied with on its way through the
    layers, chosen experts apart. decoded_numbers: of all experts, where a pass that uses them all decodes them; else 0.
    buffer_numbers: dense at the same time while it does.

    heads, head_size: of the queries. windows: how far each layer's attention reaches back, None without an end.
    score_numbers: held at once for each pair of tokens in a sequence and each head, 0 where scores are never written
    down; kept_score_numbers: of these, kept for the backward pass; sequences longer than score_tokens hold none.

    Of a layer, per token: forward_numbers held at once on the way forward, backward_numbers on the way back beside what
    was kept; kept_numbers kept for the backward pass, and kept_bytes beside them, of a type that is always the same;
    shared_numbers that a shared expert keeps for each of its neurons; cached_numbers that a key-value cache keeps, None
    for keys and values of every head. sliced_forward, sliced_backward: what is held beside these for some tokens at a
    time only, as pairs: how many, and numbers for each.
    """

    packed_bytes: int
    held_numbers: int
    layer_products: int
    decoded_numbers: int
    buffer_numbers: int
    heads: int
    head_size: int
    windows: tuple[int | None, ...]
    score_numbers: float
    kept_score_numbers: float
    forward_numbers: float
    backward_numbers: float
    kept_numbers: float
    kept_bytes: float = 0.0
    shared_numbers: float = 7.0
    score_tokens: int | None = None
    cached_numbers: float | None = None
    sliced_forward: tuple[tuple[float, float], ...] = ()
    sliced_backward: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Strategy:
    """A named, replaceable way of doing one thing: what registering hooks return.

    function: pure; no files, no devices; what it takes and returns is documented in the module that calls it
    (`nexus_core.select`, `merge`, `routing`, `distill`). parameters: pydantic model of the settings that a recipe may
    give beside the strategy's name, None when it has none. needs: names of the statistics it reads, so that collect
    gathers them. refuses: of merges, called as (MergeRequest, parameters) before anything is read; says what of it
    makes no sense, or None.
    """

    name: str
    function: Callable[..., Any]
    summary: str
    parameters: type[BaseModel] | None = None
    needs: frozenset[str] = frozenset()
    refuses: Callable[..., Refusal | None] | None = None


@dataclass(frozen=True)
class MergeRequest:
    """What a merge strategy is asked for, as far as it is known before anything is read; None is not known yet.

    merge: the strategy's name. width: neurons of the shared expert. expert_width, experts: F and E of the model.
    chosen: selected experts per layer. kept_inputs: MoE inputs that collect keeps per layer. learnt, kept: names of the
    data sets over which statistics are collected that are to be learnt, and the others.
    """

    merge: str
    width: int
    expert_width: int
    experts: int
    chosen: int | None = None
    kept_inputs: int | None = None
    learnt: tuple[str, ...] | None = None
    kept: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done, and the way out. key: the setting to change, such as `width`."""

    key: str
    message: str


@dataclass(frozen=True)
class EmbeddedFile:
    """A checkpoint folder or data file that a plugin brings along, addressed in recipes as `embedded:NAME`."""

    name: str
    path: Path
    kind: Literal["checkpoint", "data"]
    summary: str


@dataclass(frozen=True)
class RunDescription:
    """One `nexus run`, as observers see it.

    settings: the resolved recipe as plain data. source: the recipe's own text. execution: what never enters a key
    (store, tracking, device, processes, versions, the state of the recipe's repository).
    """

    recipe: str
    settings: Mapping[str, Any]
    source: str
    store: Path
    execution: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageOutcome:
    """One finished stage: where its output lies, whether it had to run, and its final numbers."""

    name: str
    key: str
    path: Path
    reused: bool
    seconds: float
    metrics: Mapping[str, float | int | str]


@dataclass(frozen=True)
class RecordedRun:
    """A run as tracking recorded it, read back.

    status: "FINISHED", "FAILED", "KILLED" or "RUNNING". settings: the resolved recipe, dotted names to text. metrics:
    final numbers: `perplexity/SET/base`, `perplexity/SET/student`, `change/SET`, `router/...`, `seconds/STAGE`, and
    every other stage's own as `STAGE/...`. learnt, kept: names of data sets. stages: as they came; reused: those of
    them that did not have to run.
    """

    run_id: str
    name: str
    status: str
    started: datetime
    settings: Mapping[str, str]
    metrics: Mapping[str, float]
    learnt: tuple[str, ...]
    kept: tuple[str, ...]
    stages: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    verdict: str = ""
