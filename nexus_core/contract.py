"""What every family promises, as checks that run on any of its base checkpoints; small ones take seconds.

Each check takes a Subject, raises BrokenContract with what was promised and what was found, and returns nothing.
CHECKS holds all of them by name. A checkpoint that fits in memory twice is enough; random numbers will do.

    # T tokens, E experts, K experts per token, D hidden size
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nexus_core.additions import RouterDelta, SharedExpert, additions, as_teacher
from nexus_core.checkpoint.links import link_shards
from nexus_core.checkpoint.reader import CheckpointReader, read_header
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.checkpoint.writer import write_index, write_json, write_shard
from nexus_core.errors import CheckpointError, PluginError
from nexus_core.models import load
from nexus_core.recipe.schema import Convert
from nexus_core.select.selection import LayerSelection, Selection
from nexus_core.stages.convert import convert
from nexus_core.statistics.listening import Listener, listen
from nexus_core.types import MoeBlock, RouterOutput

# Of the routed output's norm; float32 sums in another order differ by less than a tenth of it.
TOLERANCE = 1e-5
TOKENS_SHAPE = (2, 24)
TRAINING_STEPS = 2
FRESH_FILE = "fresh.pt"
BASE, CHANGED_ROUTER = "the base", "a changed router"
UNKNOWN_TENSOR = "model.layers.0.of_no_family.weight"


class BrokenContract(PluginError):
    """A family does not do what its hooks promise."""


@dataclass(frozen=True)
class Subject:
    """An untouched base checkpoint and an empty folder to work in. dtype: what its model computes in."""

    folder: Path
    work: Path
    dtype: torch.dtype = torch.float32

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @property
    def hook(self) -> Any:
        return self.checkpoint.family.hook

    @cached_property
    def tokens(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.checkpoint.description.vocabulary_size, TOKENS_SHAPE, generator=generator)

    def model(self, folder: Path | None = None) -> Any:
        """The model in `folder`, or the base."""
        return load(folder or self.folder, dtype=self.dtype)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(self.tokens, use_cache=False).logits

    def converted(self, name: str = "converted", start: str = "zero") -> Path:
        """The base with the mean of its first experts as shared expert in every layer."""
        out = self.work / name
        if not out.exists():
            out.mkdir(parents=True)
            experts = tuple(range(min(2, self.checkpoint.description.experts)))
            layers = tuple(LayerSelection(layer=layer, experts=experts) for layer in self.checkpoint.description.layers)
            selection = Selection(strategy="first", top_k=len(experts), layers=layers)
            convert(self.checkpoint, selection, Convert.model_validate({"start": start}), out)
        return out

    def extended(self) -> Any:
        """The base with both additions, random and not zero."""
        model = self.model()
        self.hook.nexus_attach_shared_expert(model=model, width=8)
        self.hook.nexus_attach_router_delta(model=model)
        disturb(model)
        return model


def require(condition: bool, promise: str) -> None:
    """Raise BrokenContract, saying what was promised, unless the condition holds."""
    if not condition:
        raise BrokenContract(promise)


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise BrokenContract unless two tensors are the same to the bit."""
    require(found.shape == expected.shape, f"{what}: shape {list(found.shape)} instead of {list(expected.shape)}")
    if not torch.equal(found, expected):
        difference = (found.double() - expected.double()).abs().max().item()
        raise BrokenContract(f"{what}: differ by up to {difference:.3g} instead of not at all")


def disturb(model: nn.Module) -> None:
    """Give every addition of a model random numbers, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for addition in additions(model):
            for parameter in addition.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def check_claims(subject: Subject) -> None:
    """The converted checkpoint has a model type of its own, and the same family claims it."""
    converted = open_checkpoint(subject.converted())
    owner, found = subject.checkpoint.family.name, converted.family.name
    require(found == owner, f"nexus_claims: '{found}' instead of '{owner}' claims the converted checkpoint")
    types = [checkpoint.config.get("model_type") for checkpoint in (subject.checkpoint, converted)]
    require(types[0] != types[1], f"nexus_converted_config: keeps model_type '{types[0]}', which transformers owns")
    width, expected = converted.description.shared_expert_width, subject.checkpoint.description.expert_width
    require(width == expected, f"nexus_describe_moe: a shared expert of width {expected} is described as {width}")


def check_locations(subject: Subject) -> None:
    """The description and the experts' locations agree with the headers on disk, tensor by tensor."""
    moe, entries = subject.checkpoint.description, subject.checkpoint.reader.entries
    require(list(moe.layers) == sorted(set(moe.layers)), f"nexus_describe_moe: layers {moe.layers} are not ascending")
    require(0 < moe.experts_per_token <= moe.experts, "nexus_describe_moe: more experts per token than experts")
    locations = subject.hook.nexus_enumerate_experts(config=subject.checkpoint.config)
    expected = [(layer, expert) for layer in moe.layers for expert in range(moe.experts)]
    found = [(location.layer, location.expert) for location in locations]
    require(found == expected, "nexus_enumerate_experts: must go by layer, then expert, all of them once")
    parts = [part for location in locations for part in location.parts]
    require(len(set(parts)) == len(parts), "nexus_enumerate_experts: two experts share a part")
    for part in parts:
        require(part.name in entries, f"nexus_enumerate_experts: tensor '{part.name}' is in no shard")
        stacked = entries[part.name].shape[0]
        require(
            part.index is None or stacked == moe.experts,
            f"nexus_enumerate_experts: '{part.name}' has {stacked} slices for {moe.experts} experts",
        )


def check_stored_bytes(subject: Subject) -> None:
    """The bytes told from the config are those on disk, of the experts and of everything, before and after."""
    for folder in (subject.folder, subject.converted()):
        checkpoint = open_checkpoint(folder)
        told = subject.hook.nexus_stored_bytes(config=checkpoint.config)
        entries = checkpoint.reader.entries
        on_disk = sum(entry.stored_bytes for entry in entries.values())
        require(sum(told.values()) == on_disk, f"nexus_stored_bytes: {sum(told.values())} instead of {on_disk}: {told}")
        locations = subject.hook.nexus_enumerate_experts(config=checkpoint.config)
        names = {part.name for location in locations for part in location.parts}
        experts = sum(entries[name].stored_bytes for name in names)
        require(
            told["routed_experts"] == experts, f"nexus_stored_bytes: routed_experts are {experts}, not as in {told}"
        )


def check_experts(subject: Subject) -> None:
    """An expert read from disk computes what the running model's expert computes."""
    model, moe = subject.model(), subject.checkpoint.description
    for block in _blocks(subject, model):
        hidden_TD = torch.randn(6, moe.hidden_size, generator=torch.Generator().manual_seed(block.layer))
        for expert in sorted({0, 1, moe.experts - 1}):
            weights = subject.hook.nexus_read_expert(
                reader=subject.checkpoint.reader,
                config=subject.checkpoint.config,
                layer=block.layer,
                expert=expert,
                dtype=torch.float32,
            )
            gate = functional.linear(hidden_TD, weights.gate, weights.gate_bias)
            up = functional.linear(hidden_TD, weights.up, weights.up_bias)
            neurons = subject.hook.nexus_neuron_activations(config=subject.checkpoint.config, gate=gate, up=up)
            expected = functional.linear(neurons, weights.down, weights.down_bias)
            found = _expert_output(subject, block, hidden_TD, expert).float()
            error = ((found - expected).norm() / expected.norm()).item()
            whose = f"layer {block.layer}, expert {expert}"
            require(error < TOLERANCE, f"nexus_read_expert: {whose} is off by {error:.2g} from the model's own")


def _expert_output(subject: Subject, block: MoeBlock, hidden_TD: torch.Tensor, expert: int) -> torch.Tensor:
    """What one expert puts out in the running block: the block's output with all weight on it, less that with none."""
    count = subject.checkpoint.description.experts

    def with_weight(weight: float) -> torch.Tensor:
        def reroute(module: nn.Module, arguments: Any, output: Any) -> Any:
            found: RouterOutput = subject.hook.nexus_router_logits(output=output)
            chosen = torch.arange(expert, expert + found.indices.shape[-1]) % count
            indices, weights = chosen.expand_as(found.indices), torch.zeros_like(found.weights)
            weights[:, 0] = weight
            replaced = {id(found.indices): indices.contiguous(), id(found.weights): weights}
            require(
                isinstance(output, tuple) and replaced.keys() <= {id(item) for item in output},
                "nexus_moe_blocks: the router must return the weights and indices that its block uses, in a tuple",
            )
            return tuple(replaced.get(id(item), item) for item in output)

        handle = block.router.register_forward_hook(reroute)
        try:
            with torch.no_grad():
                output = block.block(hidden_TD[None].to(subject.dtype))
        finally:
            handle.remove()
        return (output[0] if isinstance(output, tuple) else output).reshape(hidden_TD.shape)

    return with_weight(1.0) - with_weight(0.0)


def check_routers(subject: Subject) -> None:
    """The routers that hooks hear are the model's own, and the routing rule alone repeats their choice to the bit.

    With and without a change of the router.
    """
    model = subject.model()
    for state in (BASE, CHANGED_ROUTER):
        with listen(model, subject.checkpoint.family) as listener, torch.no_grad():
            output = model(subject.tokens, use_cache=False, output_router_logits=True)
        layers = subject.checkpoint.description.layers
        require(tuple(listener.routers) == layers, f"nexus_moe_blocks: heard {tuple(listener.routers)}, not {layers}")
        # A model outside transformers may record nothing; then what its routers put out is all there is to know.
        recorded = getattr(output, "router_logits", None) or [heard.logits for heard in listener.routers.values()]
        for own, (layer, router) in zip(recorded, listener.routers.items(), strict=True):
            where = f"{state}, layer {layer}"
            require_equal(router.logits, own.reshape(router.logits.shape), f"nexus_router_logits: {where}")
        _check_rule(subject, model, listener, state)
        if state == BASE:
            subject.hook.nexus_attach_router_delta(model=model)
            disturb(model)


def _check_rule(subject: Subject, model: Any, listener: Listener, state: str) -> None:
    for block in _blocks(subject, model):
        heard = listener.routers[block.layer]
        tensors = dict(block.router.named_parameters(recurse=False)) | dict(block.router.named_buffers(recurse=False))
        weights_TK, indices_TK = subject.hook.nexus_gate_weights(
            config=subject.checkpoint.config, logits=heard.logits, router=tensors
        )
        where = f"nexus_gate_weights: {state}, layer {block.layer}"
        require_equal(indices_TK, heard.indices, f"{where}, indices")
        # A family may add a change of the router in another order than the rule would, so there the last bit may differ.
        rounding = torch.finfo(heard.weights.dtype).eps if state != BASE else 0.0
        off = (weights_TK.to(heard.weights.dtype) - heard.weights).abs().max().item()
        require(off <= rounding, f"{where}, weights: differ by up to {off:.3g}")
        rounding = weights_TK.shape[1] * torch.finfo(weights_TK.dtype).eps
        sums_to_one = bool((weights_TK.float().sum(dim=-1) - 1).abs().max() <= rounding)
        described = subject.checkpoint.description.weights_sum_to_one
        require(sums_to_one or not described, "nexus_describe_moe: weights_sum_to_one, but the gate weights do not")


def check_zero_additions(subject: Subject) -> None:
    """A shared expert with a zero down-projection and a router change of zero alter no logit."""
    model = subject.model()
    before = subject.logits(model)
    subject.hook.nexus_attach_shared_expert(model=model, width=8)
    require_equal(subject.logits(model), before, "nexus_attach_shared_expert: logits with a zero output")
    subject.hook.nexus_attach_router_delta(model=model)
    require_equal(subject.logits(model), before, "nexus_attach_router_delta: logits with a change of zero")
    found = [type(addition) for addition in additions(model)]
    layers = len(subject.checkpoint.description.layers)
    for kind in (SharedExpert, RouterDelta):
        require(
            found.count(kind) == layers, f"a model with {layers} MoE layers has {found.count(kind)} {kind.__name__}s"
        )
    deltas = [addition for addition in additions(model) if isinstance(addition, RouterDelta)]
    subject.hook.nexus_attach_router_delta(model=model)
    require(deltas == [addition for addition in additions(model) if isinstance(addition, RouterDelta)],
            "nexus_attach_router_delta: a model that has changes must be left alone")  # fmt: skip


def check_teacher(subject: Subject) -> None:
    """With its additions off a model is its base, to the bit; with them on it is not."""
    base, model = subject.logits(subject.model()), subject.extended()
    changed = subject.logits(model)
    require(not torch.equal(changed, base), "the additions change nothing, so they are not in the forward pass")
    with as_teacher(model):
        require_equal(subject.logits(model), base, "as_teacher: logits of the base")
    require_equal(subject.logits(model), changed, "as_teacher: logits after leaving it")


def check_conversion(subject: Subject) -> None:
    """A zero-start conversion leaves every logit and every byte of the routed experts as they were."""
    folder = subject.converted()
    model = subject.model(folder)
    require_equal(subject.logits(model), subject.logits(subject.model()), "a zero-start conversion: logits")
    before, after = subject.checkpoint.reader, CheckpointReader(folder)
    for location in subject.hook.nexus_enumerate_experts(config=subject.checkpoint.config):
        for part in location.parts:
            same = torch.equal(_bytes(before, part.name), _bytes(after, part.name))
            require(same, f"a conversion changes '{part.name}', a routed expert's tensor")
    trainables = subject.hook.nexus_trainable_parameters(model=model)
    missing = sorted(name for name in trainables if name not in after)
    require(not missing, f"nexus_shared_expert_tensors: no tensor has the parameter's name '{(missing or [''])[0]}'")
    blank = subject.hook.nexus_read_expert(
        reader=before, config=subject.checkpoint.config, layer=subject.checkpoint.description.layers[0], expert=0,
        dtype=subject.checkpoint.dtype,
    )  # fmt: skip
    for name, tensor in subject.hook.nexus_shared_expert_tensors(
        config=subject.checkpoint.config, layer=subject.checkpoint.description.layers[0], weights=blank
    ).items():
        require(name in trainables, f"nexus_shared_expert_tensors: '{name}' is not the name of a trainable parameter")
        require(tensor.shape == trainables[name].shape, f"nexus_shared_expert_tensors: '{name}' is misshapen")


def check_full_start(subject: Subject) -> None:
    """A converted checkpoint's shared expert, as loaded, computes what the hooks say the merged expert does."""
    model = subject.model(subject.converted("full", start="full"))
    with listen(model, subject.checkpoint.family, keep_inputs=True) as listener:
        subject.logits(model)
        on = {layer: output.clone() for layer, output in listener.outputs.items()}
        first = subject.checkpoint.description.layers[0]
        inputs = listener.inputs[first]
        with as_teacher(model):
            subject.logits(model)
            off = listener.outputs[first]
    shared_expert = next(addition for addition in additions(model) if isinstance(addition, SharedExpert))
    with torch.no_grad():
        expected = shared_expert(inputs)
    error = ((on[first] - off - expected).norm() / on[first].norm()).item()
    require(error < TOLERANCE, f"layer {first}: the shared expert adds something else than its output, by {error:.2g}")
    linears = (shared_expert.gate_proj, shared_expert.up_proj, shared_expert.down_proj)
    gate, up = linears[0](inputs), linears[1](inputs)
    neurons = subject.hook.nexus_neuron_activations(config=subject.checkpoint.config, gate=gate, up=up)
    require_equal(linears[2](neurons), expected, "nexus_neuron_activations: the shared expert's activation")


def check_round_trip(subject: Subject) -> None:
    """What save_pretrained writes is read back to the bit, additions and experts, and saves the same again."""
    model = subject.extended()
    folder, again = subject.work / "saved", subject.work / "saved_again"
    model.save_pretrained(folder)
    reloaded = subject.model(folder)
    _require_same_state(reloaded, model, "save_pretrained and load")
    require_equal(subject.logits(reloaded), subject.logits(model), "save_pretrained and load: logits")
    reloaded.save_pretrained(again)
    first, second = CheckpointReader(folder), CheckpointReader(again)
    require(sorted(first) == sorted(second), "save_pretrained: the second save has other tensors than the first")
    for name in first:
        require(torch.equal(_bytes(first, name), _bytes(second, name)), f"save_pretrained: '{name}' changes on its way")
    names = set(subject.hook.nexus_trainable_parameters(model=model))
    require(
        names <= set(first), f"save_pretrained: renames {sorted(names - set(first))[:3]}, which train would not find"
    )


def check_fresh_process(subject: Subject) -> None:
    """Another process that only imports nexus_core.auto loads a converted checkpoint to the same logits."""
    check_fresh_processes([subject])


def check_fresh_processes(subjects: Sequence[Subject]) -> None:
    """The same for several checkpoints in one process, whose imports take most of the time."""
    script = (
        "import sys, torch, nexus_core.auto\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder, file, dtype in zip(*[iter(sys.argv[1:])] * 3):\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()\n"
        "    with torch.no_grad(): torch.save(model(torch.load(file), use_cache=False).logits, file)\n"
    )
    arguments: list[str] = []
    for subject in subjects:
        subject.work.mkdir(parents=True, exist_ok=True)
        torch.save(subject.tokens, subject.work / FRESH_FILE)
        dtype = str(subject.dtype).removeprefix("torch.")
        arguments += [str(subject.converted()), str(subject.work / FRESH_FILE), dtype]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    require(run.returncode == 0, f"a fresh process cannot load converted checkpoints: {run.stderr[-2000:]}")
    for subject in subjects:
        found, expected = torch.load(subject.work / FRESH_FILE), subject.logits(subject.model(subject.converted()))
        require_equal(found, expected, f"{subject.folder.name} in a fresh process: logits")


def check_training(subject: Subject) -> None:
    """Two steps of training change what is trainable, in every layer, and nothing else by a single bit."""
    model = subject.extended()
    trainables: dict[str, nn.Parameter] = subject.hook.nexus_trainable_parameters(model=model)
    model.requires_grad_(False)
    for parameter in trainables.values():
        parameter.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainables.values(), lr=1e-2)
    for _ in range(TRAINING_STEPS):
        logits = model(subject.tokens, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), subject.tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        same = torch.equal(_raw(tensor), _raw(before[name]))
        require(name in trainables or same, f"training changes '{name}', which is frozen")
        require(name not in trainables or not same, f"training does not reach '{name}'")


def check_refusals(subject: Subject) -> None:
    """A checkpoint that lacks a tensor, or has one of no meaning, is refused with the tensor's name."""
    converted = open_checkpoint(subject.converted())
    parts = subject.hook.nexus_enumerate_experts(config=converted.config)[-1].parts
    shared = set(converted.reader) - set(subject.checkpoint.reader)
    others = set(subject.checkpoint.reader) - {part.name for part in parts}
    lacking = [parts[0].name, sorted(shared)[0], next(name for name in sorted(others) if "norm" in name)]
    for number, name in enumerate(lacking):
        folder = _altered(converted, subject.work / f"lacks_{number}", drop=name)
        _require_refused(subject, folder, name, f"a checkpoint without '{name}'")
    folder = _altered(converted, subject.work / "has_more", add={UNKNOWN_TENSOR: torch.zeros(2)})
    _require_refused(subject, folder, UNKNOWN_TENSOR, f"a checkpoint with a tensor '{UNKNOWN_TENSOR}'")


CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "claims": check_claims,
    "locations": check_locations,
    "stored_bytes": check_stored_bytes,
    "experts": check_experts,
    "routers": check_routers,
    "zero_additions": check_zero_additions,
    "teacher": check_teacher,
    "conversion": check_conversion,
    "full_start": check_full_start,
    "round_trip": check_round_trip,
    "fresh_process": check_fresh_process,
    "training": check_training,
    "refusals": check_refusals,
}


def _blocks(subject: Subject, model: Any) -> list[MoeBlock]:
    blocks: list[MoeBlock] = subject.hook.nexus_moe_blocks(model=model)
    return blocks


def _require_same_state(found: nn.Module, expected: nn.Module, what: str) -> None:
    states = [module.state_dict() for module in (found, expected)]
    require(list(states[0]) == list(states[1]), f"{what}: other tensors come back than were saved")
    for name, tensor in states[0].items():
        require(torch.equal(_raw(tensor), _raw(states[1][name])), f"{what}: '{name}' comes back changed")


def _require_refused(subject: Subject, folder: Path, name: str, what: str) -> None:
    try:
        subject.model(folder)
    except CheckpointError as error:
        require(name in str(error), f"{what} is refused without its name: {error}")
    else:
        raise BrokenContract(f"{what} is loaded without a word; transformers would fill in or drop it")


def _altered(source: Checkpoint, out: Path, *, drop: str = "", add: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A copy of a checkpoint without a tensor, or with some more."""
    out.mkdir(parents=True)
    left_out = {source.reader.entry(drop).shard.name} if drop else set()
    _, entries = link_shards(source.reader, out, left_out)
    moved = {
        name: source.reader.read(name)
        for name, entry in source.reader.entries.items()
        if entry.shard.name in left_out and name != drop
    } | dict(add or {})
    if moved:
        write_shard(out / "altered.safetensors", moved)
        entries = [*entries, *read_header(out / "altered.safetensors").values()]
    write_index(out, entries)
    write_json(out / "config.json", source.config)
    return out


def _bytes(reader: CheckpointReader, name: str) -> torch.Tensor:
    return _raw(reader.read(name))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    # NaN is not equal to itself, and 8-bit floats compare to nothing on some devices: look at the bytes.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
