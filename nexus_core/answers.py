"""What a family answers to each of its hooks about one checkpoint, in a few words: for `nexus plugins --check`.

Every hook is asked by itself, so that one that fails hides no other; those of the running model only if it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nexus_core.additions import RouterDelta, SharedExpert, additions, router_tensors
from nexus_core.checkpoint.source import Checkpoint
from nexus_core.errors import NexusError
from nexus_core.models import ignored_tensors, load
from nexus_core.plugins import DEFAULTS, installed
from nexus_core.statistics.listening import listen
from nexus_core.types import ExpertLocation, ExpertWeights, MoeDescription, RouterOutput

# Shown with --debug: where in the plugin's code an answer failed.
LOG = logging.getLogger(__name__)

TOKENS = 4
SHARED_WIDTH = 8

# Hooks without a default that a family may leave out, and what that means.
OPTIONAL = {
    "nexus_read_expert_rows": "not there: experts are read whole",
    "nexus_register_auto": "not there: the family has no classes of its own",
}


@dataclass(frozen=True)
class Answer:
    """One hook's: by whom (a plugin, or `nexus_core` for a default), what in short, and whether it is none."""

    hook: str
    by: str
    text: str
    failed: bool = False


class _NotAsked(Exception):
    """Why a hook is not asked."""


def answers(checkpoint: Checkpoint, *, loads_model: bool) -> Iterator[Answer]:
    """The family's answers in the order of hookspecs.py. loads_model: for the hooks that need the model."""
    questions = _Questions(checkpoint, loads_model)
    for hook, ask in questions.all().items():
        owner = checkpoint.family.name
        answered = hook in installed().hooks_of(owner)
        by = owner if answered else DEFAULTS if hook in installed().hooks_of(DEFAULTS) else ""
        if not by:
            yield Answer(hook, "", OPTIONAL.get(hook, "missing"), failed=hook not in OPTIONAL)
            continue
        try:
            yield Answer(hook, by, ask())
        except _NotAsked as reason:
            yield Answer(hook, by, str(reason))
        except NexusError as error:
            LOG.debug("%s refuses", hook, exc_info=True)
            yield Answer(hook, by, str(error), failed=True)
        except Exception as error:  # an answer of the wrong kind fails where it is looked at
            LOG.debug("the answer of %s cannot be used", hook, exc_info=True)
            yield Answer(hook, by, f"its answer cannot be used: {type(error).__name__}: {error}", failed=True)


class _Questions:
    def __init__(self, checkpoint: Checkpoint, loads_model: bool):
        self.checkpoint, self.config, self.hook = checkpoint, checkpoint.config, checkpoint.family.hook
        self.loads_model = loads_model
        self._model: Any = None
        self._does_not_load = False
        self._router: RouterOutput | None = None

    def all(self) -> dict[str, Callable[[], str]]:
        return {
            "nexus_claims": lambda: f"model_type '{self.config.get('model_type')}' is its own",
            "nexus_describe_moe": self.describe_moe,
            "nexus_enumerate_experts": self.enumerate_experts,
            "nexus_read_expert": self.read_expert,
            "nexus_read_expert_rows": self.read_expert_rows,
            "nexus_dequantize": self.dequantize,
            "nexus_stored_bytes": self.stored_bytes,
            "nexus_load_model": lambda: f"{type(self.model).__name__}, {self.model.num_parameters():,} parameters",
            "nexus_register_auto": self.register_auto,
            "nexus_moe_blocks": self.moe_blocks,
            "nexus_router_logits": self.router_logits,
            "nexus_gate_weights": self.gate_weights,
            "nexus_neuron_activations": self.neuron_activations,
            "nexus_expert_weights": self.expert_weights,
            "nexus_attach_shared_expert": self.attach_shared_expert,
            "nexus_attach_router_delta": self.attach_router_delta,
            "nexus_trainable_parameters": self.trainable_parameters,
            "nexus_reply_parts": self.reply_parts,
            "nexus_shared_expert_tensors": self.shared_expert_tensors,
            "nexus_converted_config": self.converted_config,
        }

    @property
    def model(self) -> Any:
        if not self.loads_model:
            raise _NotAsked("not asked: the model is large, --load loads it")
        if self._does_not_load:
            raise _NotAsked("not asked: it needs the model, which nexus_load_model does not give")
        if self._model is None:
            self._does_not_load = True
            self._model = load(self.checkpoint, dtype=torch.float32)
            self._does_not_load = False
        return self._model

    @property
    def moe(self) -> MoeDescription:
        return self.checkpoint.description

    @property
    def blank(self) -> ExpertWeights:
        sizes = (self.moe.expert_width, self.moe.hidden_size)
        gate, up, down = torch.zeros(sizes), torch.zeros(sizes), torch.zeros(sizes[::-1])
        if not self.moe.has_expert_biases:
            return ExpertWeights(gate, up, down)
        return ExpertWeights(gate, up, down, gate[:, 0], gate[:, 0], down[:, 0])

    def describe_moe(self) -> str:
        moe = self.moe
        return (
            f"{moe.family}: {len(moe.layers)} layers of {moe.experts} experts, {moe.experts_per_token} per token, "
            f"hidden {moe.hidden_size}, width {moe.expert_width}, vocabulary {moe.vocabulary_size:,}, {moe.storage}"
            + (f", shared expert of width {moe.shared_expert_width}" if moe.shared_expert_width else "")
        )

    def enumerate_experts(self) -> str:
        locations: list[ExpertLocation] = self.hook.nexus_enumerate_experts(config=self.config)
        missing = [p.name for place in locations for p in place.parts if p.name not in self.checkpoint.reader]
        if missing:
            raise NexusError(f"{len(missing)} tensors are in no shard, the first is '{missing[0]}'")
        first = locations[0].parts[0]
        where = first.name if first.index is None else f"{first.name}[{first.index}]"
        return f"{len(locations)} experts, all there; the first begins with {where}"

    def read_expert(self) -> str:
        return self._shapes(self._expert_on_disk())

    def _expert_on_disk(self) -> ExpertWeights:
        return self.hook.nexus_read_expert(
            reader=self.checkpoint.reader, config=self.config, layer=self.moe.layers[0], expert=0, dtype=torch.float32
        )

    def _shapes(self, expert: ExpertWeights) -> str:
        shapes = [list(tensor.shape) for tensor in (expert.gate, expert.up, expert.down)]
        blank = self.blank
        expected = [list(tensor.shape) for tensor in (blank.gate, blank.up, blank.down)]
        if shapes != expected:
            raise NexusError(f"gate, up and down are {shapes}; expected are {expected}")
        biases = ", biases" if expert.gate_bias is not None else ""
        return "gate {}, up {}, down {}".format(*shapes) + biases

    def read_expert_rows(self) -> str:
        whole = self._expert_on_disk()
        for projection in ("gate", "up", "down"):
            weight, _ = self.hook.nexus_read_expert_rows(
                reader=self.checkpoint.reader,
                config=self.config,
                layer=self.moe.layers[0],
                expert=0,
                projection=projection,
                rows=slice(1, 3),
                dtype=torch.float32,
            )
            if not torch.equal(weight, getattr(whole, projection)[1:3]):
                raise NexusError(f"rows 1 and 2 of {projection} are not those that nexus_read_expert gives")
        return "the same rows as nexus_read_expert's"

    def expert_weights(self) -> str:
        block = self.hook.nexus_moe_blocks(model=self.model)[0]
        held, stored = (
            self.hook.nexus_expert_weights(block=block, expert=0, dtype=torch.float32),
            self._expert_on_disk(),
        )
        shapes = self._shapes(held)
        for part in ("gate", "up", "down"):
            if not torch.equal(getattr(held, part), getattr(stored, part)):
                raise NexusError(f"{part} of layer {block.layer}, expert 0 is not what nexus_read_expert gives")
        return shapes + ", as on disk"

    def dequantize(self) -> str:
        dense = self.hook.nexus_dequantize(config=self.config, tensors={"weight": torch.zeros(1)}, dtype=torch.float32)
        return f"a plain float32 weight is given back as {dense.dtype}".replace("torch.", "")

    def stored_bytes(self) -> str:
        parts = self.hook.nexus_stored_bytes(config=self.config)
        unread = self._unread()
        on_disk = sum(e.stored_bytes for name, e in self.checkpoint.reader.entries.items() if name not in unread)
        told = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in parts.items() if size)
        if sum(parts.values()) != on_disk:
            raise NexusError(f"{told}: together {sum(parts.values()):,} bytes, but the shards hold {on_disk:,}")
        return f"{told}: together the {on_disk:,} bytes on disk"

    def _unread(self) -> frozenset[str]:
        """Tensors that the model's class leaves unread; none if it cannot be asked, which nexus_load_model tells."""
        try:
            return ignored_tensors(self.model, self.checkpoint.reader)
        except Exception:
            self._does_not_load = False
            return frozenset()

    def register_auto(self) -> str:
        installed().ask_one(self.checkpoint.family.name, "nexus_register_auto")
        return "registered"

    def moe_blocks(self) -> str:
        blocks = self.hook.nexus_moe_blocks(model=self.model)
        if [block.layer for block in blocks] != list(self.moe.layers):
            raise NexusError(f"layers {[block.layer for block in blocks]}, but the config has {list(self.moe.layers)}")
        return f"{len(blocks)} of {type(blocks[0].block).__name__} with {type(blocks[0].router).__name__}"

    @torch.no_grad()
    def _heard(self) -> RouterOutput:
        """What the first router says of a few tokens, once."""
        if self._router is None:
            with listen(self.model, self.checkpoint.family) as listener:
                self.model(input_ids=torch.arange(TOKENS)[None] % self.moe.vocabulary_size, use_cache=False)
            listener.refuse_if_incomplete()
            self._router = listener.routers[self.moe.layers[0]]
        return self._router

    def _refuse_another_choice(self, tensors: Mapping[str, torch.Tensor]) -> None:
        heard = self._heard()
        _, indices_TK = self.hook.nexus_gate_weights(config=self.config, logits=heard.logits, router=tensors)
        if not torch.equal(indices_TK.sort(-1).values, heard.indices.sort(-1).values):
            raise NexusError("for the running router's logits it chooses other experts than the running router does")

    def router_logits(self) -> str:
        router = self._heard()
        shapes = [list(tensor.shape) for tensor in (router.logits, router.weights, router.indices)]
        expected = [[TOKENS, self.moe.experts], *[[TOKENS, self.moe.experts_per_token]] * 2]
        if shapes != expected:
            raise NexusError(f"logits {shapes[0]}, weights {shapes[1]}, indices {shapes[2]}; expected are {expected}")
        return f"{TOKENS} tokens: logits {shapes[0]}, weights and indices {shapes[1]}"

    def gate_weights(self) -> str:
        router: dict[str, torch.Tensor] = {}
        if self.loads_model:
            router = router_tensors(self.hook.nexus_moe_blocks(model=self.model)[0].router)
            self._refuse_another_choice(router)
        logits_TE = torch.linspace(-1, 1, TOKENS * self.moe.experts).reshape(TOKENS, -1)
        weights_TK, _ = self.hook.nexus_gate_weights(config=self.config, logits=logits_TE, router=router)
        total = float(weights_TK.detach().sum(-1).mean())
        if self.moe.weights_sum_to_one != (abs(total - 1) < 1e-3) and self.moe.weights_sum_to_one:
            raise NexusError(f"weights sum to {total:.3f}, though nexus_describe_moe says that they sum to 1")
        return f"{weights_TK.shape[-1]} per token, weights sum to {total:.3f}"

    def neuron_activations(self) -> str:
        neurons = self.hook.nexus_neuron_activations(config=self.config, gate=torch.ones(1, 1), up=torch.ones(1, 1))
        return f"gate 1 and up 1 give {float(neurons):.4f}"

    def attach_shared_expert(self) -> str:
        if self.moe.shared_expert_width:
            raise _NotAsked("not asked: the checkpoint has shared experts already")
        self.hook.nexus_attach_shared_expert(model=self.model, width=SHARED_WIDTH)
        return self._attached(SharedExpert)

    def attach_router_delta(self) -> str:
        self.hook.nexus_attach_router_delta(model=self.model)
        return self._attached(RouterDelta)

    def _attached(self, kind: type) -> str:
        count = sum(isinstance(addition, kind) for addition in additions(self.model))
        if count != len(self.moe.layers):
            raise NexusError(f"{count} {kind.__name__} modules for {len(self.moe.layers)} layers")
        return f"{count} {kind.__name__} modules"

    def trainable_parameters(self) -> str:
        names = list(self.hook.nexus_trainable_parameters(model=self.model))
        if not names:
            raise NexusError("nothing, so nothing would be trained")
        return f"{len(names)}, the first is {names[0]}"

    def reply_parts(self) -> str:
        thought, said = self.hook.nexus_reply_parts(config=self.config, text="yes")
        return f"'yes' is {'said' if said == 'yes' else 'thought' if thought == 'yes' else 'neither said nor thought'}"

    def shared_expert_tensors(self) -> str:
        tensors = self.hook.nexus_shared_expert_tensors(
            config=self.config, layer=self.moe.layers[0], weights=self.blank
        )
        name, tensor = next(iter(tensors.items()))
        return f"{len(tensors)} a layer, the first is {name} {list(tensor.shape)} {tensor.dtype}".replace("torch.", "")

    def converted_config(self) -> str:
        config = self.hook.nexus_converted_config(config=self.config, width=self.moe.expert_width)
        owner = installed().family(config, "the converted checkpoint").name
        if owner != self.checkpoint.family.name:
            raise NexusError(f"model_type '{config['model_type']}' is claimed by '{owner}'")
        return f"model_type '{config['model_type']}', claimed by the same plugin"
