"""Router probabilities of every token, for people who want more than moments: one NPZ file, written as it comes.

# T tokens, L layers, E experts
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import torch

from nexus_core.errors import ShapeError

FILE_NAME = "router_probabilities.npz"


class ProbabilityWriter:
    """Writes `probabilities` (T, L, E) float16 and `layers` (L,), readable with `numpy.load`, in constant memory.

    Not compressed: random numbers hardly shrink, and it would be slower than the model. Raises ShapeError on leaving
    the context if fewer tokens came than were announced, for then the file is not valid.
    """

    def __init__(self, path: Path, tokens: int, layers: tuple[int, ...], experts: int):
        self.path, self.tokens, self.layers, self.experts = path, tokens, layers, experts
        self.written = 0

    def __enter__(self) -> ProbabilityWriter:
        self._archive = zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED)
        with self._archive.open("layers.npy", "w") as entry:
            np.lib.format.write_array(cast(Any, entry), np.array(self.layers, dtype=np.int64))
        self._entry: IO[bytes] = self._archive.open("probabilities.npy", "w", force_zip64=True)
        shape = (self.tokens, len(self.layers), self.experts)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f2")), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(cast(Any, self._entry), header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entry.close()
        self._archive.close()
        if kind is None and self.written < self.tokens:
            raise ShapeError(f"{self.path}: {self.written} of {self.tokens} tokens were written")

    @torch.no_grad()
    def write(self, logits_LTE: list[torch.Tensor]) -> None:
        """Add tokens by their router logits, one (T, E) per layer; those beyond the announced number are left out."""
        wanted = self.tokens - self.written
        if wanted <= 0:
            return
        layers = [torch.softmax(logits_TE[:wanted].float(), dim=1) for logits_TE in logits_LTE]
        probabilities_TLE = torch.stack(layers, dim=1).half().cpu().numpy()
        self._entry.write(probabilities_TLE.astype("<f2", copy=False).tobytes())
        self.written += len(probabilities_TLE)


def stored_bytes(tokens: int, layers: int, experts: int) -> int:
    """Size of the file, but for a few hundred bytes."""
    return 2 * tokens * layers * experts
