"""A teacher on disk: `capture.json`, which says of whom and of what it is, and checksummed chunks of sequences.

A chunk is a safetensors file with a receipt beside it that holds its SHA-256; a chunk without a whole receipt is not
there. So capture can be killed at any moment and goes on with the first chunk that is missing, and any number of
processes read the same files, which are mapped, not loaded.

    # T tokens of a chunk that have router logits, L layers, E experts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from nexus_core.checkpoint.writer import write_json, write_shard
from nexus_core.data.packing import PackedSequences
from nexus_core.distill import stored_routers
from nexus_core.distill.stored_logits import StoredLogits
from nexus_core.distill.stored_routers import StoredRouters
from nexus_core.errors import DataError, UsageError

MANIFEST_NAME = "capture.json"
CHUNKS_NAME = "chunks"
FORMAT = 1

# Tokens of one chunk, about: what an interrupted capture does again, and what its buffers hold.
CHUNK_TOKENS = 16_384

_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Consecutive sequences of one data set. sha256: of the file; measured: sums that capture took of them."""

    set_name: str
    first: int
    sequences: int
    file: str
    sha256: str
    measured: dict[str, float]


def sequences_per_chunk(sequence_length: int) -> int:
    """How many sequences of one set make a chunk."""
    return max(1, CHUNK_TOKENS // sequence_length)


def tokens_digest(packed: PackedSequences) -> str:
    """SHA-256 of the exact sequences: their tokens, targets, places in documents and lengths."""
    total = hashlib.sha256(str(tuple(packed.input_ids.shape)).encode())
    for tensor in (packed.input_ids, packed.targets, packed.positions, packed.lengths):
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def write_chunk(
    folder: Path,
    set_name: str,
    first: int,
    logits: list[StoredLogits],
    routers: list[StoredRouters],
    measured: Mapping[str, float],
) -> Chunk:
    """Write the sequences from number `first` on; either list has one entry a sequence, or none."""
    sequences = max(len(logits), len(routers))
    tensors: dict[str, torch.Tensor] = {}
    if logits:
        tensors["tokens"] = torch.tensor([len(part) for part in logits])
        tensors["data_bytes"] = torch.tensor([len(part.data) for part in logits])
        for name in ("counts", "steps", "tails", "data"):
            tensors[name] = torch.from_numpy(np.concatenate([getattr(part, name) for part in logits]))
    if routers:
        tensors["router_tokens"] = torch.tensor([len(part.steps) for part in routers])
        tensors["router_levels"] = torch.cat([part.levels for part in routers])
        tensors["router_steps"] = torch.cat([part.steps for part in routers])
    file = f"{CHUNKS_NAME}/{set_name}-{first:08d}.safetensors"
    (folder / CHUNKS_NAME).mkdir(exist_ok=True)
    write_shard(folder / file, tensors)
    chunk = Chunk(set_name, first, sequences, file, _sha256(folder / file), dict(measured))
    write_json((folder / file).with_suffix(".json"), vars(chunk))
    return chunk


def find_chunk(folder: Path, set_name: str, first: int) -> Chunk | None:
    """A chunk that an interrupted capture left whole, else None."""
    file = f"{CHUNKS_NAME}/{set_name}-{first:08d}.safetensors"
    try:
        chunk = Chunk(**json.loads((folder / file).with_suffix(".json").read_text()))
        return chunk if _sha256(folder / file) == chunk.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def write_manifest(folder: Path, content: Mapping[str, Any], chunks: list[Chunk]) -> None:
    """Write capture.json, which makes the folder a stored teacher."""
    write_json(folder / MANIFEST_NAME, {"format": FORMAT, **content, "chunks": [vars(chunk) for chunk in chunks]})


class TeacherStore:
    """Reads a stored teacher, sequence by sequence. Each chunk's checksum is verified when it is first opened.

    Raises DataError if the folder is no stored teacher, or a chunk is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / MANIFEST_NAME).read_text())
            chunks = [Chunk(**chunk) for chunk in self.manifest["chunks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder}: is no stored teacher, its {MANIFEST_NAME} cannot be read ({error}); "
                "make one with nexus capture"
            ) from error
        if self.manifest["format"] != FORMAT:
            raise DataError(
                f"{self.folder}: was captured in format {self.manifest['format']}, and this version reads {FORMAT}; "
                "capture again"
            )
        self.vocabulary_size: int = self.manifest["vocabulary_size"]
        self._chunk_of = {(chunk.set_name, chunk.first + i): chunk for chunk in chunks for i in range(chunk.sequences)}
        self._open: dict[str, _OpenChunk] = {}

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which has the checksums of everything else."""
        return _sha256(self.folder / MANIFEST_NAME)

    def refuse_unless_of(
        self,
        sets: Mapping[str, PackedSequences],
        learnt: frozenset[str],
        model: str,
        tokenizer: str,
        needs_routers: bool,
    ) -> None:
        """Raises UsageError if it is a teacher of another model, tokenizer or data than the run's.

        model: identity of the model to learn from; tokenizer: digest of the vocabulary; sets: what is trained on.
        """
        where, advice = f"{self.folder}: this stored teacher", "capture it again for this run (nexus capture)"
        if self.manifest["model"]["identity"] != model:
            raise UsageError(
                f"{where} is another model's, {self.manifest['model']['name']}, than the run learns from; {advice}"
            )
        if self.manifest["tokenizer"] != tokenizer:
            raise UsageError(f"{where} has another tokenizer than the model that is trained; {advice}")
        if needs_routers and not self.manifest["routers"]:
            raise UsageError(
                f"{where} has no router logits, which router_kl compares with; set train.losses.router_kl to 0, "
                f"or {advice}"
            )
        for name, packed in sets.items():
            known = self.manifest["sets"].get(name, {})
            if known.get("tokens") != tokens_digest(packed):
                raise UsageError(
                    f"{where} saw other text than the data set '{name}' of this run (its sources, share, sequence "
                    f"length, number of steps or seed differ); {advice}"
                )
            if known["kept"] is (name in learnt):
                other = "to be kept" if known["kept"] else "to be learnt"
                raise UsageError(f"{where} was captured with the data set '{name}' {other}; {advice}")

    def logits(self, set_name: str, sequence: int) -> StoredLogits:
        """What the teacher says where targets of one sequence of a kept set count."""
        chunk, place = self._find(set_name, sequence)
        return chunk.logits(place)

    def routers(self, set_name: str, sequence: int) -> torch.Tensor:
        """Router logits (T, L, E) of the text of one sequence."""
        chunk, place = self._find(set_name, sequence)
        return chunk.routers(place)

    def no_routers(self) -> torch.Tensor:
        """Router logits (0, L, E) of no text."""
        return self.routers(*next(iter(self._chunk_of)))[:0]

    def _find(self, set_name: str, sequence: int) -> tuple[_OpenChunk, int]:
        chunk = self._chunk_of.get((set_name, sequence))
        if chunk is None:
            raise DataError(f"{self.folder}: sequence {sequence} of '{set_name}' was not captured; capture again")
        if chunk.file not in self._open:
            path = self.folder / chunk.file
            try:
                if _sha256(path) != chunk.sha256:
                    raise DataError(
                        f"{path}: is damaged, its checksum is not the one in {MANIFEST_NAME}; capture again"
                    )
                self._open[chunk.file] = _OpenChunk(path)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: cannot be read ({error}); capture again") from error
        return self._open[chunk.file], sequence - chunk.first


class _OpenChunk:
    """A mapped chunk: only what is asked for is read."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        names = set(self._file.keys())
        self._tokens, self._data, self._router_tokens = (
            np.concatenate([[0], np.cumsum(self._file.get_tensor(name).numpy())]) if name in names else np.zeros(1, int)
            for name in ("tokens", "data_bytes", "router_tokens")
        )

    def logits(self, place: int) -> StoredLogits:
        def part(name: str, ends: np.ndarray) -> np.ndarray:
            return self._file.get_slice(name)[int(ends[place]) : int(ends[place + 1])].numpy()

        per_token = {name: part(name, self._tokens) for name in ("counts", "steps", "tails")}
        return StoredLogits(**per_token, data=part("data", self._data))

    def routers(self, place: int) -> torch.Tensor:
        start, end = int(self._router_tokens[place]), int(self._router_tokens[place + 1])
        levels, steps = (self._file.get_slice(f"router_{name}")[start:end] for name in ("levels", "steps"))
        return stored_routers.decode(StoredRouters(levels, steps))


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            total.update(block)
    return total.hexdigest()
