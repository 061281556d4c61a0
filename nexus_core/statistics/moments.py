"""Router statistics of any number of tokens in a few megabytes: sums, from which means and covariances are exact.

# L layers, E experts, K experts per token, T tokens
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexus_core.errors import ShapeError, UsageError
from nexus_core.types import RouterOutput

FILE_NAME = "router_stats.safetensors"

# Version of the file's layout, and where in its header that and other metadata stand.
LAYOUT = 1
METADATA_NAME = "nexus"

# Tokens taken at once on CPU: few enough for the cache.
SLICE_TOKENS = 1024


@dataclass
class RouterStatistics:
    """Sums over tokens, per layer; all float64 or int64, so that a billion tokens lose nothing.

    layers: indices of the layers, in the order of the first dimension. tokens: how many each layer has seen, (L,).
    probability_sum (L, E) and second_moment_sum (L, E, E): of the softmax over all experts. topk_count (L, E): tokens
    routed to each expert. gate_mass (L, E): gate weights each received. coselection (L, E, E): tokens routed to both,
    on the diagonal topk_count. entropy_sum (L,): of the softmax, in nats. output_norm_sum (L, E): of gate weight x norm
    of the expert's output over the tokens routed to it; None where it was not gathered.
    """

    layers: tuple[int, ...]
    tokens_per_layer: torch.Tensor
    probability_sum: torch.Tensor
    second_moment_sum: torch.Tensor
    topk_count: torch.Tensor
    gate_mass: torch.Tensor
    coselection: torch.Tensor
    entropy_sum: torch.Tensor
    output_norm_sum: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls,
        layers: Sequence[int],
        experts: int,
        device: str | torch.device = "cpu",
        *,
        expert_norms: bool = False,
    ) -> RouterStatistics:
        """Statistics of no tokens yet.

        device: where the routers' outputs will be, so that nothing is moved. expert_norms: with output_norm_sum, which
        is not `update`'s to add to.
        """
        count = len(layers)

        def sums(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tuple(layers),
            torch.zeros(count, dtype=torch.int64),
            sums(count, experts),
            sums(count, experts, experts),
            sums(count, experts, dtype=torch.int64),
            sums(count, experts),
            sums(count, experts, experts, dtype=torch.int64),
            sums(count),
            sums(count, experts) if expert_norms else None,
        )

    @property
    def tokens(self) -> int:
        """Tokens that every layer has seen. Raises ShapeError if the layers have seen different numbers."""
        counts = self.tokens_per_layer.unique()
        if len(counts) != 1:
            raise ShapeError(f"layers have seen different numbers of tokens: {self.tokens_per_layer.tolist()}")
        return int(counts[0])

    @property
    def experts(self) -> int:
        """E."""
        return self.probability_sum.shape[1]

    @torch.no_grad()
    def update(self, position: int, router: RouterOutput, mask_T: torch.Tensor | None = None) -> None:
        """Add the tokens of one forward pass of one layer.

        position: of the layer in `layers`. mask_T: which tokens count, (T,) bool, all if left out. The router's own
        choice is taken as it is. Raises ShapeError if the router has another number of experts.
        """
        logits_TE, weights_TK, indices_TK = router.logits, router.weights, router.indices
        experts = self.experts
        if logits_TE.ndim != 2 or logits_TE.shape[1] != experts:
            raise ShapeError(f"router logits are {tuple(logits_TE.shape)}, not (tokens, {experts})")
        if mask_T is not None:
            logits_TE, weights_TK, indices_TK = logits_TE[mask_T], weights_TK[mask_T], indices_TK[mask_T]
        self.tokens_per_layer[position] += len(logits_TE)
        self._add_probabilities(position, logits_TE)
        pairs_TKK = indices_TK[:, :, None] * experts + indices_TK[:, None, :]
        coselection_EE = torch.bincount(pairs_TKK.flatten(), minlength=experts**2).view(experts, experts)
        self.coselection[position] += coselection_EE
        self.topk_count[position] += coselection_EE.diagonal()
        # index_add_ rather than a weighted bincount, which has no deterministic form on GPUs
        self.gate_mass[position].index_add_(0, indices_TK.flatten(), weights_TK.flatten().double())

    def _add_probabilities(self, position: int, logits_TE: torch.Tensor) -> None:
        upper_EE = torch.zeros_like(self.second_moment_sum[position])
        on_cpu = logits_TE.device.type == "cpu"
        # On CPU in slices, whose float64 copies stay in the cache; a GPU wants all at once.
        size = SLICE_TOKENS if on_cpu else max(len(logits_TE), 1)
        # Products as small as a slice's take several threads of OpenBLAS two to ten times as long as one.
        with _blas().limit(limits=1) if on_cpu else nullcontext():
            for slice_TE in logits_TE.split(size):
                probabilities_TE, entropy = softmax_and_entropy(slice_TE)
                upper_EE += second_moment(probabilities_TE)
                self.entropy_sum[position] += entropy
        second_moment_EE = upper_EE.triu() + upper_EE.triu(1).T
        self.second_moment_sum[position] += second_moment_EE
        # A token's probabilities add up to 1, so the sum over j of p_i p_j is p_i.
        self.probability_sum[position] += second_moment_EE.sum(dim=1)

    def merge(self, other: RouterStatistics) -> RouterStatistics:
        """The statistics of both sets of tokens together. Raises ShapeError if they are of different models."""
        if self.layers != other.layers or self.experts != other.experts:
            raise ShapeError(
                f"statistics of layers {self.layers} with {self.experts} experts and of layers {other.layers} with "
                f"{other.experts} cannot be merged"
            )
        if (self.output_norm_sum is None) != (other.output_norm_sum is None):
            raise ShapeError("statistics with and without expert norms cannot be merged")
        ours, theirs = self._sums(), other.to(self.probability_sum.device)._sums()
        return RouterStatistics(self.layers, **{name: ours[name] + theirs[name] for name in ours})

    def _sums(self) -> dict[str, torch.Tensor]:
        return {name: value for name in _SUMS if (value := getattr(self, name)) is not None}

    def state(self) -> dict[str, torch.Tensor]:
        """Every sum on the CPU, to go on after an interruption."""
        return {name: value.cpu() for name, value in self._sums().items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on after `state`."""
        for name, value in self._sums().items():
            value.copy_(state[name])

    def to(self, device: str | torch.device) -> RouterStatistics:
        """The same statistics with all sums on `device`."""
        return RouterStatistics(self.layers, **{name: value.to(device) for name, value in self._sums().items()})

    def mean(self) -> torch.Tensor:
        """Mean probability of every expert, (L, E) float64."""
        return self.probability_sum / max(self.tokens, 1)

    def covariance(self) -> torch.Tensor:
        """Covariance of the experts' probabilities, (L, E, E) float64, unbiased: divided by tokens - 1.

        Raises ShapeError if there are fewer than two tokens.
        """
        tokens = self.tokens
        if tokens < 2:
            raise ShapeError(f"a covariance needs at least 2 tokens; these statistics have {tokens}")
        mean_LE = self.mean()
        # In this order of products (i, j) and (j, i) round alike.
        return (self.second_moment_sum - tokens * (mean_LE[:, :, None] * mean_LE[:, None, :])) / (tokens - 1)

    def mean_entropy(self) -> torch.Tensor:
        """Mean entropy of the softmax over all experts, nats per token, (L,) float64."""
        return self.entropy_sum / max(self.tokens, 1)

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write everything to one safetensors file; of symmetric matrices the upper triangles.

        metadata: plain data on where the statistics come from, kept as JSON.
        """
        from safetensors.torch import save

        rows, columns = torch.triu_indices(self.experts, self.experts)
        tensors = {name: value.cpu() for name, value in self._sums().items()}
        for name in _SYMMETRIC:
            tensors[name] = tensors[name][:, rows, columns]
        tensors["layers"] = torch.tensor(self.layers)
        content = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            # One entry: safetensors writes several in random order, and equal statistics would differ in their bytes.
            metadata={METADATA_NAME: json.dumps({"layout": LAYOUT, **metadata})},
        )
        # Not save_file: its files can be read by their owner only.
        path.write_bytes(content)

    @classmethod
    def load(cls, path: Path) -> tuple[RouterStatistics, dict[str, Any]]:
        """Statistics and their metadata. path: the file, or the folder that `collect` filled.

        Raises UsageError if there is no such file or it is not one of these.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"{file}: there are no router statistics; make them with `nexus collect`")
        try:
            with safe_open(file, framework="pt") as opened:
                known = json.loads((opened.metadata() or {}).get(METADATA_NAME, "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file}: is not a whole safetensors file ({error}); run `nexus collect` again") from error
        missing = {"layers", *_SUMS} - {_OPTIONAL} - set(tensors)
        layout = known.pop("layout", None)
        if missing or layout != LAYOUT:
            raise UsageError(
                f"{file}: holds no router statistics of this version of NEXUS (layout {layout}, missing: "
                f"{', '.join(sorted(missing)) or 'nothing'}); run `nexus collect` again"
            )
        experts = tensors["probability_sum"].shape[1]
        rows, columns = torch.triu_indices(experts, experts)
        for name in _SYMMETRIC:
            triangle = tensors[name]
            square = triangle.new_zeros(len(triangle), experts, experts)
            square[:, rows, columns] = triangle
            square[:, columns, rows] = triangle
            tensors[name] = square
        layers = tuple(tensors["layers"].tolist())
        return cls(layers, **{name: tensors[name] for name in _SUMS if name in tensors}), known


_SUMS = tuple(field.name for field in fields(RouterStatistics) if field.name != "layers")
_OPTIONAL = "output_norm_sum"
_SYMMETRIC = ("second_moment_sum", "coselection")


def softmax_and_entropy(logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the experts, (T, E) float64, and the sum over tokens of its entropy in nats.

    Entropy is the log of the normaliser minus the mean logit, both relative to the largest logit. An expert that is
    masked out (logit -inf) has probability 0 and counts as nothing.
    """
    shifted_TE = logits_TE.to(torch.float64, copy=True).sub_(logits_TE.amax(dim=1, keepdim=True))
    probabilities_TE = _exp(shifted_TE)
    normaliser_T1 = probabilities_TE.sum(dim=1, keepdim=True)
    probabilities_TE.mul_(normaliser_T1.reciprocal())
    mean_logit_sum = torch.dot(probabilities_TE.flatten(), shifted_TE.flatten())
    if mean_logit_sum.isnan():
        # The smallest finite number instead of -inf: times a probability of 0 it is 0, not NaN.
        shifted_TE.clamp_(min=torch.finfo(shifted_TE.dtype).min)
        mean_logit_sum = torch.dot(probabilities_TE.flatten(), shifted_TE.flatten())
    return probabilities_TE, normaliser_T1.log().sum() - mean_logit_sum


def _exp(values: torch.Tensor) -> torch.Tensor:
    # NumPy's float64 exp takes half the time of torch's on CPU.
    return torch.from_numpy(np.exp(values.numpy())) if values.device.type == "cpu" else values.exp()


@cache
def _blas() -> Any:
    # Finding the libraries takes milliseconds, limiting their threads microseconds.
    import scipy.linalg.blas  # noqa: F401 (only what is loaded is found)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def second_moment(probabilities_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of p p^T, (E, E) float64; only its upper triangle is meant.

    On CPU by BLAS's symmetric product, which torch does not offer: half the work, so float64 costs what a float32
    product would, whose rounding (1e-6 of the covariance at 128 experts) is more than PCA should see.
    """
    if probabilities_TE.device.type != "cpu":
        return probabilities_TE.T @ probabilities_TE
    from scipy.linalg.blas import dsyrk

    # The transpose of a row-major array is what BLAS takes without a copy.
    return torch.from_numpy(dsyrk(1.0, probabilities_TE.contiguous().numpy().T))
