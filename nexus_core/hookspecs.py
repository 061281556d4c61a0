"""Every hook of NEXUS: the one file a plugin author reads.

A plugin is a module (or object) listed in the entry-point group `nexus.plugins` whose functions carry
`@nexus_core.hookimpl` and are named as below; pluggy lets an implementation leave out arguments it does not need.
Keep heavy imports (torch, transformers) inside the functions, so that `nexus --help` stays quick.

Three kinds of hook:

* *family* hooks describe one model family. `nexus_claims` decides who owns a checkpoint; the others are then asked of
  the owner only, plus core's defaults, which speak plain Hugging Face. The first answer that is not None counts.
* *registering* hooks add strategies, formats, files, commands; all answers are kept.
* *observing* hooks are told what happens; their answers are ignored.

Shapes: L layers, E experts, K experts per token, T tokens, D hidden size, F expert width.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from nexus_core.types import (
    EmbeddedFile,
    ExpertLocation,
    ExpertWeights,
    MoeBlock,
    MoeDescription,
    RouterOutput,
    RunDescription,
    RunningCosts,
    StageOutcome,
    Strategy,
)

if TYPE_CHECKING:
    import click
    import torch
    from torch import nn

    from nexus_core.checkpoint.reader import CheckpointReader

PROJECT = "nexus"

# Raised when a hook is removed, or changes so that an implementation written before may be wrong: another name, an
# argument less, another shape, unit or meaning. New hooks and new arguments do not raise it. A plugin says which
# version it was written for with `NEXUS_HOOKS = 1`; the promise and the list of changes are in docs/hooks.md.
HOOKS_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Family hooks: which checkpoint, and what is in it.


@hookspec
def nexus_claims(config: Mapping[str, Any]) -> bool | None:
    """Say True if this plugin owns a checkpoint with this `config.json`; exactly one plugin must.

    config: the parsed file. Called whenever a checkpoint is opened; must not import torch.
    Example: `return config.get("model_type") in ("my_moe", "nexus_my_moe")`
    """


@hookspec(firstresult=True)
def nexus_describe_moe(config: Mapping[str, Any]) -> MoeDescription | None:
    """Layers, experts, sizes and storage, read from the config alone.

    Called by every stage and by `nexus check`; raises CheckpointError if a needed field is missing.
    """


@hookspec(firstresult=True)
def nexus_enumerate_experts(config: Mapping[str, Any]) -> list[ExpertLocation] | None:
    """Where each routed expert lies on disk, ordered by layer, then expert: L * E locations.

    Called by convert to see, before it writes anything, that a checkpoint is whole, and by the contract tests to
    compare the routed experts' bytes before and after.
    """


@hookspec(firstresult=True)
def nexus_read_expert(
    reader: CheckpointReader, config: Mapping[str, Any], layer: int, expert: int, dtype: torch.dtype
) -> ExpertWeights | None:
    """One routed expert, dense, in canonical layout and `dtype`, by reading its slices only.

    Called by convert for the chosen experts, one at a time, so memory stays at a few experts.
    """


@hookspec(firstresult=True)
def nexus_read_expert_rows(
    reader: CheckpointReader,
    config: Mapping[str, Any],
    layer: int,
    expert: int,
    projection: Literal["gate", "up", "down"],
    rows: slice,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Some rows of one matrix of a routed expert, dense, in `dtype`, and the same rows of its bias or None.

    rows: start and stop, step 1, of gate or up (F, D) or of down (D, F), as `nexus_read_expert` would give them. With
    it convert works in tiles that stay in the processor's cache. A family that does not answer it is read by whole
    experts.
    """


@hookspec(firstresult=True)
def nexus_dequantize(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor | None:
    """The dense form of one stored weight, given the tensors that store it by their role.

    config: for settings of the storage, such as the size of a block. tensors: role to tensor, e.g. {"blocks":
    (..., G, 16) uint8, "scales": (..., G) uint8}; the roles are the family's own. Default: the only tensor, converted.
    """


@hookspec(firstresult=True)
def nexus_stored_bytes(config: Mapping[str, Any]) -> Mapping[str, int] | None:
    """Bytes of the checkpoint by part, from the config alone: "routed_experts", "router", "attention", "embeddings",
    "shared_experts" (NEXUS's and the base's own), "dense_layers" where some have no experts. Norms count with what they
    precede. Called by `nexus check` to tell memory and disk before anything is read.
    """


@hookspec(firstresult=True)
def nexus_running_costs(config: Mapping[str, Any], device: Literal["cpu", "cuda"]) -> RunningCosts | None:
    """What holding and running the model takes on a kind of device, counted from the config; must not import torch.

    Called by `nexus check` to tell memory and time before anything is read, and by `nexus run` to refuse what cannot
    fit. Default: counted from `nexus_describe_moe`, `nexus_stored_bytes` and the config's usual names for attention,
    with experts that are dense unless their storage is no floating-point type.
    """


@hookspec(firstresult=True)
def nexus_number_fault(config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the numbers of a stored tensor, such as "has NaN at [3, 7]"; "" if nothing is.

    tensor: as stored, whole or one slice of its first dimension. Called by `nexus doctor` for every tensor. Default:
    floating-point numbers must be finite; of bytes nothing is known.
    """


@hookspec(firstresult=True)
def nexus_backends() -> Mapping[str, str] | None:
    """Which implementation has done which part of the work in this process, e.g. {"decode on cpu": "numba"}.

    Called after every stage of a run, and by `nexus doctor` after it has run the model. Default: nothing to tell.
    """


@hookspec(firstresult=True)
def nexus_load_model(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> nn.Module | None:
    """The checkpoint as a transformers causal language model, in evaluation mode, routed experts in stored form.

    dtype: of the floating-point weights. device: where to put them, e.g. "cpu" or "cuda:0". A missing or unknown
    tensor raises CheckpointError with its name. Default: AutoModelForCausalLM.
    """


@hookspec
def nexus_register_auto() -> None:
    """Register the family's own configuration and model classes with transformers' Auto classes.

    Called once by `import nexus_core.auto`, and before any checkpoint is loaded.
    """


# Family hooks: the running model.


@hookspec(firstresult=True)
def nexus_moe_blocks(model: nn.Module) -> list[MoeBlock] | None:
    """The modules core listens to, one per layer in MoeDescription.layers, in that order."""


@hookspec(firstresult=True)
def nexus_router_logits(output: Any) -> RouterOutput | None:
    """What a router module's forward returned, as logits (T, E), gate weights (T, K) and indices (T, K).

    Called in a forward hook of MoeBlock.router; must keep the autograd graph. Default: a tuple in just this order.
    """


@hookspec(firstresult=True)
def nexus_gate_weights(
    config: Mapping[str, Any], logits: torch.Tensor, router: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The family's routing rule alone: logits (T, E) to gate weights (T, K) and expert indices (T, K).

    router: the layer's router's own tensors by name, as its `named_parameters` and `named_buffers` give them (those of
    modules inside it with dots), for rules that choose by more than the logits, such as a selection bias; most leave
    the argument out. The weights may be in float32 where the running model rounds them. Used where only logits are at
    hand (stored statistics, tests that replay a router).
    """


@hookspec(firstresult=True)
def nexus_neuron_activations(config: Mapping[str, Any], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """What an expert's neurons put out: the family's activation of gate and up (T, F) each, as (T, F).

    gate, up: after their biases. With the expert's linear maps, which core knows, this is the whole expert; convert
    uses it to tell what a merged expert does to its layer. Default: silu(gate) * up, where config says
    `hidden_act: silu`.
    """


@hookspec(firstresult=True)
def nexus_expert_weights(block: MoeBlock, expert: int, dtype: torch.dtype) -> ExpertWeights | None:
    """One routed expert of a running model, dense, in canonical layout and `dtype`, on the model's device.

    The counterpart of `nexus_read_expert` in memory. Called by collect, for every expert of every batch, where expert
    norms and neuron saliency are asked for. Default: `experts.gate_up_proj` (E, 2F, D), gate above up, and
    `experts.down_proj` (E, D, F) of the block, as transformers holds most families.
    """


@hookspec(firstresult=True)
def nexus_attach_shared_expert(model: nn.Module, width: int) -> bool | None:
    """Give a loaded model one shared expert of `width` neurons per MoE layer, down-projection zero; returns True.

    The new modules are `nexus_core.additions.SharedExpert`, so that `nexus_core.as_teacher` can switch them off, and
    model.config afterwards describes a converted model, so that save_pretrained and from_pretrained round-trip.
    """


@hookspec(firstresult=True)
def nexus_attach_router_delta(model: nn.Module) -> bool | None:
    """Give every router a trainable change, zero at first, added to the frozen router's logits; returns True.

    The new modules are `nexus_core.additions.RouterDelta`: the base's router stays as it is, so the teacher always
    routes as the base does. A model that has them already is left alone.
    """


@hookspec(firstresult=True)
def nexus_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter] | None:
    """Everything NEXUS may train, by parameter name: shared experts and router deltas.

    Default: the parameters of all `nexus_core.additions.Addition` modules.
    """


@hookspec(firstresult=True)
def nexus_reply_parts(config: Mapping[str, Any], text: str) -> tuple[str, str] | None:
    """A chat reply so far, special tokens included, as what the model thinks and what it says to the user.

    Called by `nexus chat` after every token; each part may only grow as the text does. Special tokens that remain are
    removed by the caller. Default: all of it is said.
    """


# Family hooks: converted and exported checkpoints.


@hookspec(firstresult=True)
def nexus_shared_expert_tensors(
    config: Mapping[str, Any], layer: int, weights: ExpertWeights
) -> dict[str, torch.Tensor] | None:
    """The tensors, by their name on disk, that hold this layer's shared expert in a converted checkpoint.

    Under the names of the model's parameters, by which train finds and replaces them, and in the type they are stored
    in. Casts only: convert first calls it with tensors on the "meta" device, which have no values, to learn names,
    types and shapes before anything is computed.
    """


@hookspec(firstresult=True)
def nexus_converted_config(config: Mapping[str, Any], width: int) -> dict[str, Any] | None:
    """The config.json of the converted checkpoint: the base's, with the own model_type and the shared width."""


# Registering hooks.


@hookspec
def nexus_selection_strategies() -> list[Strategy]:
    """Ways to rank a layer's experts, `select.strategy` in recipes. What the function gets: `nexus_core.select`."""


@hookspec
def nexus_merge_strategies() -> list[Strategy]:
    """Ways to build one shared expert from routed ones, `convert.merge`. What it gets: `nexus_core.merge`."""


@hookspec
def nexus_routing_strategies() -> list[Strategy]:
    """What of the router learns and when, `train.routing.strategy`. What it gets: `nexus_core.routing`."""


@hookspec
def nexus_losses() -> list[Strategy]:
    """Terms of the training loss, weighted by name in `train.losses`. What it gets: `nexus_core.distill`."""


@hookspec
def nexus_data_formats() -> list[Strategy]:
    """Shapes of a record, `format` of a data source. What it gets: `nexus_core.data.formats`."""


@hookspec
def nexus_embedded_files() -> list[EmbeddedFile]:
    """Checkpoints and data sets that come with the plugin, addressed as `embedded:NAME`."""


@hookspec
def nexus_cli_commands() -> list[click.Command]:
    """Further commands of `nexus`. Asked only when a command is not one of core's, so help stays quick."""


# Observing hooks.


@hookspec
def nexus_run_started(run: RunDescription) -> None:
    """A recipe begins: its settings are resolved, nothing has run."""


@hookspec
def nexus_stage_started(run: RunDescription, stage: str, key: str, settings: Mapping[str, Any]) -> None:
    """A stage begins to run (not called for one that is reused). settings: what its key is made of."""


@hookspec
def nexus_metrics(stage: str, step: int, values: Mapping[str, float]) -> None:
    """Numbers of one step of a running stage; may be called many times a second, so buffer."""


@hookspec
def nexus_stage_finished(run: RunDescription, outcome: StageOutcome) -> None:
    """A stage's output lies in its place, whether it ran or was reused."""


@hookspec
def nexus_stage_failed(run: RunDescription, stage: str, error: BaseException) -> None:
    """A stage raised, or was interrupted; what it had written stays for the next try."""


@hookspec
def nexus_run_finished(run: RunDescription, status: str, outcomes: list[StageOutcome]) -> None:
    """The end of a recipe. status: "done" or "failed"."""
