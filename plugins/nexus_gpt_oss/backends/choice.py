"""Which backend computes the experts: by the device, forced by the environment, or on a GPU by a short timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from nexus_gpt_oss import execution
from nexus_gpt_oss.backends import ExpertsBackend, grouped
from nexus_gpt_oss.backends.loop import LoopBackend
from nexus_gpt_oss.backends.rows import Experts, Needs, PackedMatrix, Routing, sort_by_expert
from nexus_gpt_oss.backends.sorted_rows import SortedBackend
from nexus_gpt_oss.decoding.format import GROUP, GROUP_BYTES, SCALE_BIAS

# E experts, D hidden size, T tokens, R rows

PART = "experts"
NAMES = ("fused", "grouped", "loop")

# Largest relative error, in the norm, that a backend's output and gradient may have against the loop's.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-12}

# Timings are for rows per expert of a power of two, the last for all beyond, and for a layer of a few experts.
MOST_TIMED_ROWS = 1024
TIMED_EXPERTS = 8
TIMED_ROUNDS = 3

Make = Callable[[], ExpertsBackend]


@dataclass(frozen=True)
class Sizes:
    """Of one layer's experts. width: of one expert."""

    experts: int
    hidden_size: int
    width: int


def backend_for(device: torch.device, dtype: torch.dtype, sizes: Sizes, rows: int) -> ExpertsBackend:
    """The backend for so many rows, chosen once for a device, type, layer size and magnitude of rows per expert.

    On a CPU the loop. On a GPU whatever is fastest there of what agrees with the loop: the same for the same shapes
    within a process. With torch.use_deterministic_algorithms nothing is timed, for timings may come out differently
    in another run, and it is `grouped`. Raises UsageError if the environment forces a backend that does not work.
    """
    forced = execution.forced(PART, NAMES)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    is_timed = device.type == "cuda" and not is_deterministic
    if forced:
        names: tuple[str, ...] = (forced,)
    elif device.type == "cuda":
        names = NAMES[1:] if is_deterministic else NAMES
    else:
        names = ("loop",)
    rows_each = _magnitude(rows / sizes.experts) if is_timed else MOST_TIMED_ROWS
    where = f"{device.type}, {rows_each} rows each" if is_timed else device.type
    candidates = {variant: make for name in names for variant, make in _variants(name, device, dtype, is_timed).items()}
    return execution.choose(
        PART,
        (device, dtype, sizes, rows_each, names),
        where,
        candidates,
        is_forced=forced is not None,
        seconds=partial(_seconds, device, dtype, sizes, rows_each) if is_timed else None,
    )


def _variants(name: str, device: torch.device, dtype: torch.dtype, is_timed: bool) -> Mapping[str, Make]:
    """A backend, or all its variants that are worth timing, by name; making one checks it."""
    if name == "loop":
        return {name: LoopBackend}
    if name == "grouped":
        return _grouped(device, dtype)
    if device.type == "cuda" and dtype != torch.bfloat16:
        return {name: partial(_unavailable, f"multiplies bfloat16 on a GPU, not {dtype}")}
    try:
        from nexus_gpt_oss.backends import fused
    except ImportError as error:
        return {name: partial(_unavailable, f"{error.name or error} is not installed")}

    def made(tile: fused.Tile) -> ExpertsBackend:
        return checked(SortedBackend(fused.FusedProducts(tile)), device, dtype)

    if not is_timed:
        return {name: partial(made, fused.TILES[1])}
    return {f"{name} {tile.rows}x{tile.columns}": partial(made, tile) for tile in fused.TILES}


def _unavailable(reason: str) -> ExpertsBackend:
    raise execution.Unavailable(reason)


def _grouped(device: torch.device, dtype: torch.dtype) -> Mapping[str, Make]:
    """With torch's grouped products, and with one product after the other, for types, layouts and devices that torch
    has no kernel for; only so on a CPU, where nothing is launched and torch's would take memory that is then copied.
    """

    def made(multiply: grouped.GroupedProduct) -> ExpertsBackend:
        return checked(SortedBackend(grouped.GroupedProducts(grouped.buffer_bytes(), multiply)), device, dtype)

    in_turn = partial(made, grouped.multiply_in_turn)
    if device.type == "cpu":
        return {"grouped": in_turn}
    return {"grouped": partial(made, grouped.multiply_by_torch), "grouped in turn": in_turn}


# Choosing may happen in inference mode, whose tensors know no gradients.
@torch.inference_mode(False)
def checked(backend: ExpertsBackend, device: torch.device, dtype: torch.dtype) -> ExpertsBackend:
    """The backend. Raises Unavailable unless its output and gradient for a small layer are the loop's."""
    # No size is a multiple of a tile's, one expert has no row, one more rows than a tile has.
    experts, routing, hidden_TD, weights_TK = _problem(device, dtype, Sizes(5, 160, 96), [3, 0, 300, 17, 1])
    for mine, theirs in zip(
        _answers(backend, experts, routing, hidden_TD, weights_TK),
        _answers(LoopBackend(), experts, routing, hidden_TD, weights_TK),
        strict=True,
    ):
        error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        if not error <= TOLERANCES[dtype]:
            raise execution.Unavailable(f"is off by {error:.2g} from the loop")
    return backend


@torch.inference_mode(False)
def _seconds(device: torch.device, dtype: torch.dtype, sizes: Sizes, rows_each: int, backend: ExpertsBackend) -> float:
    """The least seconds that forward and backward took."""
    experts = min(sizes.experts, TIMED_EXPERTS)
    problem = _problem(device, dtype, Sizes(experts, sizes.hidden_size, sizes.width), [rows_each] * experts)
    _answers(backend, *problem)
    least = float("inf")
    for _ in range(TIMED_ROUNDS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        _answers(backend, *problem)
        torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least


def _answers(
    backend: ExpertsBackend, experts: Experts, routing: Routing, hidden_TD: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, and the gradients of hidden states and gate weights, the output's cotangent being the hidden states."""
    needs = Needs(hidden=True, weights=True)
    forward = backend.forward(experts, routing, hidden_TD, weights_TK, needs)
    gradients = backend.backward(experts, routing, hidden_TD, weights_TK, forward.kept, needs)
    assert gradients.hidden_TD is not None
    assert gradients.weights_TK is not None
    return forward.summed_TD, gradients.hidden_TD, gradients.weights_TK


def _problem(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, counts: list[int]
) -> tuple[Experts, Routing, torch.Tensor, torch.Tensor]:
    """A random layer and one token per row, each sent to one expert, so many to each."""
    generator = torch.Generator(device).manual_seed(0)

    def matrix(outputs: int, inputs: int) -> PackedMatrix:
        # Numbers of about 0.03, so that activations lie around one, at the real sizes too.
        blocks = torch.randint(
            256,
            (sizes.experts, outputs, inputs // GROUP, GROUP_BYTES),
            dtype=torch.uint8,
            device=device,
            generator=generator,
        )
        scales = torch.randint(
            SCALE_BIAS - 7, SCALE_BIAS - 4, blocks.shape[:-1], dtype=torch.uint8, device=device, generator=generator
        )
        bias = torch.randn(sizes.experts, outputs, device=device, generator=generator).to(dtype)
        return PackedMatrix(blocks, scales, bias)

    def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (up + 1) * gate * torch.sigmoid(gate)

    experts = Experts(matrix(2 * sizes.width, sizes.hidden_size), matrix(sizes.hidden_size, sizes.width), activation)
    tokens = sum(counts)
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    # Tokens in another order than rows.
    indices = chosen[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))].to(device)
    hidden_TD = torch.randn(tokens, sizes.hidden_size, device=device, generator=generator).to(dtype)
    weights = torch.rand(tokens, 1, device=device, generator=generator).to(dtype)
    return experts, sort_by_expert(indices[:, None], sizes.experts), hidden_TD, weights


def _magnitude(rows_each: float) -> int:
    """The next power of two, at most MOST_TIMED_ROWS."""
    magnitude = 1
    while magnitude < min(rows_each, MOST_TIMED_ROWS):
        magnitude *= 2
    return magnitude
