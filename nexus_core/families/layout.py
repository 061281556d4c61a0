"""One family as data: what its modules and tensors are called, how it routes, and what its config calls its sizes.

# L layers, E experts, D hidden size, F expert width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nexus_core.errors import CheckpointError, PluginError
from nexus_core.families.rules import Config, Rule, required
from nexus_core.types import ExpertLocation, ExpertWeights, MoeDescription, TensorPart

if TYPE_CHECKING:
    import torch

    from nexus_core.checkpoint.reader import TensorEntry

# What an addition is called inside its block and its router. Families may have a `shared_expert` of their own.
SHARED_EXPERT = "nexus_shared_expert"
ROUTER_DELTA = "router_delta"

CONVERTED_PREFIX = "nexus_"
Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
BYTES_PER_NUMBER = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class PerExpert:
    """Experts that lie on disk as three tensors each: (F, D), (F, D), (D, F).

    Names under `model.layers.N.`, with `{expert}` for the index.
    """

    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"

    def parts(self, prefix: str, expert: int) -> tuple[TensorPart, ...]:
        return tuple(TensorPart(prefix + name.format(expert=expert)) for name in (self.gate, self.up, self.down))

    def rows(self, projection: Projection, rows: slice, width: int) -> tuple[int, slice]:
        """Which of an expert's parts holds a projection's rows, and where in it."""
        return PROJECTIONS.index(projection), rows

    def weights(self, tensors: list[torch.Tensor]) -> ExpertWeights:
        gate, up, down = tensors
        return ExpertWeights(gate, up, down)


@dataclass(frozen=True)
class Fused:
    """Experts that lie on disk as two tensors a layer: (E, 2F, D), rows of gate before rows of up, and (E, D, F).

    Names under `model.layers.N.`.
    """

    gate_up: str
    down: str

    def parts(self, prefix: str, expert: int) -> tuple[TensorPart, ...]:
        return tuple(TensorPart(prefix + name, expert) for name in (self.gate_up, self.down))

    def rows(self, projection: Projection, rows: slice, width: int) -> tuple[int, slice]:
        """Which of an expert's parts holds a projection's rows, and where in it."""
        if projection == "down":
            return 1, rows
        above = width if projection == "up" else 0
        return 0, slice(rows.start + above, rows.stop + above)

    def weights(self, tensors: list[torch.Tensor]) -> ExpertWeights:
        gate_up, down = tensors
        gate, up = gate_up.chunk(2)
        return ExpertWeights(gate.clone(), up.clone(), down)


def every_layer(config: Config) -> list[int]:
    """All decoder layers: there are no dense ones."""
    return list(range(size(config, "num_hidden_layers")))


def after_dense_layers(config: Config) -> list[int]:
    """All decoder layers but the first `first_k_dense_replace`."""
    return every_layer(config)[required(config, "first_k_dense_replace") :]


@dataclass(frozen=True)
class Layout:
    """A family of transformers whose experts are fused in memory and whose router is a module.

    model_type: of the base, in config.json; transformers has the model's classes under it. gate_weights: the routing
    rule, see `nexus_core.families.rules`. weights_sum_to_one: whether a token's gate weights do.
    block, router: names of the modules, in a decoder layer and in the block. The block calls its router, whose forward
    returns logits (T, E), weights and indices (T, K), and holds `experts.gate_up_proj` (E, 2F, D) and
    `experts.down_proj` (E, D, F). stored_experts, stored_router: their names on disk under `model.layers.N.`.
    stored_names: of every other tensor that transformers renames when it loads the family, its name in memory and its
    name on disk, both under `model.layers.N.`.
    experts, expert_width, experts_per_token: what config.json calls E, F and K: a name, or several of which the first
    that is there counts.
    layers: which decoder layers hold experts. kept_float32: parts of the names of tensors that are never rounded.
    matrix_suffixes: what the names of the tensors that store one matrix end in, beside its own.

    A family with another storage than dense numbers overrides `storage`, `parts`, `prepare` and `check`; one whose
    config says its sizes in another way overrides `describe`.
    """

    model_type: str
    gate_weights: Rule
    weights_sum_to_one: Callable[[Config], bool]
    block: str = "mlp"
    router: str = "gate"
    stored_experts: PerExpert | Fused = PerExpert()
    stored_router: str = "mlp.gate.weight"
    stored_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    experts: str | tuple[str, ...] = ("num_experts", "num_local_experts")
    expert_width: str | tuple[str, ...] = "moe_intermediate_size"
    experts_per_token: str | tuple[str, ...] = "num_experts_per_tok"
    layers: Callable[[Config], list[int]] = every_layer
    kept_float32: tuple[str, ...] = ()
    matrix_suffixes: tuple[str, ...] = ()

    @property
    def converted_model_type(self) -> str:
        return CONVERTED_PREFIX + self.model_type

    def describe(self, config: Config) -> MoeDescription:
        """Raises CheckpointError if a size is missing from the config or makes no sense."""
        described = MoeDescription(
            family=self.model_type,
            model_type=str(config["model_type"]),
            layers=tuple(self.layers(config)),
            experts=size(config, self.experts),
            experts_per_token=size(config, self.experts_per_token),
            hidden_size=size(config, "hidden_size"),
            expert_width=size(config, self.expert_width),
            vocabulary_size=size(config, "vocab_size"),
            storage=self.storage(config),
            weights_sum_to_one=self.weights_sum_to_one(config),
            has_expert_biases=False,
            shared_expert_width=int(config.get("shared_expert_width") or 0),
        )
        if not described.layers:
            raise CheckpointError("config.json: by its numbers no layer has experts, so there is nothing to convert")
        return described

    def route(
        self, config: Config, logits_TE: torch.Tensor, router: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate weights and expert indices (T, K) by the family's rule, which finds K as `num_experts_per_tok`.

        Raises PluginError if the rule asks for a setting or a tensor that is not there.
        """
        settings = {**config, "num_experts_per_tok": self.describe(config).experts_per_token}
        try:
            return self.gate_weights(settings, logits_TE, router)
        except KeyError as error:
            raise PluginError(
                f"the routing rule of {self.model_type} asks for {error}, which is neither in config.json nor among "
                f"the router's own tensors ({', '.join(router)})"
            ) from error

    def locations(self, config: Config) -> list[ExpertLocation]:
        """Where each routed expert lies, by layer, then expert."""
        moe = self.describe(config)
        return [
            ExpertLocation(layer, expert, self.parts(config, layer, expert))
            for layer in moe.layers
            for expert in range(moe.experts)
        ]

    def storage(self, config: Config) -> str:
        """How routed experts lie on disk, for people."""
        if config.get("quantization_config"):
            raise CheckpointError(
                f"config.json: a {self.model_type} with a quantization_config: its plugin reads dense experts only; "
                "use a checkpoint in bfloat16, float16 or float32"
            )
        return number_type(config)

    def parts(self, config: Config, layer: int, expert: int) -> tuple[TensorPart, ...]:
        """What one expert is stored in: its matrices, then what else belongs to it."""
        return self.stored_experts.parts(layer_prefix(layer), expert)

    def read_expert(self, read: Callable[[TensorPart], torch.Tensor], layer: int, expert: int) -> ExpertWeights:
        """One expert, each of its matrices as `read` gives it, dense."""
        parts = self.stored_experts.parts(layer_prefix(layer), expert)
        return self.stored_experts.weights([read(part) for part in parts])

    def rows(
        self, config: Config, layer: int, expert: int, projection: Projection, rows: slice
    ) -> tuple[TensorPart, slice]:
        """Where some rows of one of an expert's matrices lie."""
        part, place = self.stored_experts.rows(projection, rows, size(config, self.expert_width))
        return self.stored_experts.parts(layer_prefix(layer), expert)[part], place

    def prepare(self, model: Any) -> None:
        """Put the family's own modules into a newly built model, which has no numbers yet."""

    def check(self, entries: Mapping[str, TensorEntry], folder: Path) -> None:
        """Raise CheckpointError for what the headers of a checkpoint's tensors show to be wrong."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Rules need not be picklable; the layout of an installed plugin is found again by its model type.
        return installed_layout, (self.model_type,)

    def __deepcopy__(self, memo: object) -> Layout:
        return self

    def shared_expert_tensor(self, layer: int, projection: Projection) -> str:
        """The name, in memory and on disk, of a shared expert's matrix."""
        return f"{layer_prefix(layer)}{self.block}.{SHARED_EXPERT}.{projection}_proj.weight"


def installed_layout(model_type: str) -> Layout:
    """The layout of this type among the installed plugins'. Raises PluginError if none brings it."""
    for layout in installed_layouts():
        if layout.model_type == model_type:
            return layout
    raise PluginError(f"no installed plugin brings a layout of model_type '{model_type}'")


def installed_layouts() -> Iterator[Layout]:
    """The layouts of all installed plugins that are made of layouts."""
    from nexus_core.plugins import installed

    for _, plugin in installed().manager.list_name_plugin():
        yield from (row for row in getattr(plugin, "layouts", ()) if isinstance(row, Layout))


def layer_prefix(layer: int) -> str:
    """What the names of a decoder layer's tensors begin with."""
    return f"model.layers.{layer}."


def number_type(config: Config) -> str:
    """The type of the checkpoint's numbers, e.g. "bfloat16". Raises CheckpointError if no checkpoint has it."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if name not in BYTES_PER_NUMBER:
        raise CheckpointError(f"config.json: dtype '{name}' is not one of {', '.join(BYTES_PER_NUMBER)}")
    return name


def size(config: Config, names: str | tuple[str, ...]) -> int:
    """A size by the first of its names that the config has. Raises CheckpointError if it is no positive number."""
    names = (names,) if isinstance(names, str) else names
    name = next((name for name in names if config.get(name) is not None), " or ".join(names))
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "is missing" if value is None else f"is {value!r}, not a positive number"
        raise CheckpointError(f"config.json: {name} {found}, so the model's size is unknown")
    return value
