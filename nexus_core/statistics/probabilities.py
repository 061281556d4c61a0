"""Router probabilities of every token, for people who want more than moments: one NPZ file, written as it comes.

# T tokens, L layers, E experts

An NPZ file is a ZIP archive of arrays. Python's own writer can only go through one from beginning to end; this one
knows every size beforehand, so that an interrupted pass goes on where the file stands.
Format: APPNOTE.TXT of PKWARE, 4.3, with 64-bit sizes; nothing is compressed, for random numbers hardly shrink.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from zipfile import ZipFile

import numpy as np
import torch

from nexus_core.errors import ShapeError

FILE_NAME = "router_probabilities.npz"

# ZIP cannot store dates before this one; a real one would make equal files differ.
_FIRST_OF_JANUARY_1980 = 33
_VERSION_WITH_64_BITS = 45
_SEE_EXTRA_FIELD = 0xFFFFFFFF

# Tokens that are copied at once from file to file.
_COPIED_ROWS = 1024


class ProbabilityWriter:
    """Writes `probabilities` (T, L, E) float16 and `layers` (L,), readable with `numpy.load`, in constant memory.

    Raises ShapeError on leaving the context if fewer tokens came than were announced, for then the file is not valid.
    """

    def __init__(self, path: Path, tokens: int, layers: tuple[int, ...], experts: int):
        self.path, self.tokens, self.layers, self.experts = path, tokens, layers, experts
        self.written = 0
        number, rows = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array(number, np.array(layers, dtype=np.int64))
        shape = (tokens, len(layers), experts)
        np.lib.format.write_array_header_2_0(rows, {"descr": "<f2", "fortran_order": False, "shape": shape})
        self._layers, self._header = number.getvalue(), rows.getvalue()
        self._checksum = zlib.crc32(self._header)
        self._row_bytes = 2 * len(layers) * experts

    def state(self) -> dict[str, torch.Tensor]:
        """How far the file is, which is on the disk by then, to go on there after an interruption."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"written": torch.tensor(self.written), "checksum": torch.tensor(self._checksum)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on after `state`; to be called before the context. Raises ShapeError if the file is not so far."""
        written = int(state["written"])
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._start() + written * self._row_bytes:
            raise ShapeError(f"{self.path}: is shorter than the {written} tokens that were written to it")
        self.written, self._checksum = written, int(state["checksum"])

    def __enter__(self) -> ProbabilityWriter:
        self._file: BinaryIO = self.path.open("r+b" if self.written else "w+b")
        self._write_headers()
        self._file.seek(self._start() + self.written * self._row_bytes)
        self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            if self.written < self.tokens:
                raise ShapeError(f"{self.path}: {self.written} of {self.tokens} tokens were written")
            self._file.write(self._directory(self._file.tell()))
            # Only now is the checksum known that stands before the data.
            self._write_headers()
            self._file.flush()
            os.fsync(self._file.fileno())

    @torch.no_grad()
    def write(self, logits_LTE: list[torch.Tensor]) -> None:
        """Add tokens by their router logits, one (T, E) per layer; those beyond the announced number are left out."""
        wanted = self.tokens - self.written
        if wanted <= 0:
            return
        layers = [torch.softmax(logits_TE[:wanted].float(), dim=1) for logits_TE in logits_LTE]
        probabilities_TLE = torch.stack(layers, dim=1).half().cpu().numpy()
        self._append(probabilities_TLE.astype("<f2", copy=False).tobytes())

    def copy(self, path: Path) -> None:
        """Add all tokens of a file that another writer finished, of the same layers and experts."""
        with ZipFile(path) as archive, archive.open("probabilities.npy") as rows:
            np.lib.format.read_magic(rows)
            np.lib.format.read_array_header_2_0(rows)
            while content := rows.read(_COPIED_ROWS * self._row_bytes):
                self._append(content)

    def _append(self, content: bytes) -> None:
        self._checksum = zlib.crc32(content, self._checksum)
        self._file.write(content)
        self.written += len(content) // self._row_bytes

    def _start(self) -> int:
        """Where the first token's probabilities stand."""
        return sum(len(self._local(*entry[:3])) for entry in self._entries()) + len(self._layers) + len(self._header)

    def _entries(self) -> list[tuple[bytes, int, int, int]]:
        """Name, bytes, checksum and place of each array."""
        first = (b"layers.npy", len(self._layers), zlib.crc32(self._layers), 0)
        place = len(self._local(*first[:3])) + len(self._layers)
        size = len(self._header) + self.tokens * self._row_bytes
        return [first, (b"probabilities.npy", size, self._checksum, place)]

    def _write_headers(self) -> None:
        self._file.seek(0)
        for (name, size, checksum, _), content in zip(self._entries(), (self._layers, self._header), strict=True):
            self._file.write(self._local(name, size, checksum) + content)

    @staticmethod
    def _local(name: bytes, size: int, checksum: int) -> bytes:
        see = _SEE_EXTRA_FIELD
        fixed = (_VERSION_WITH_64_BITS, 0, 0, 0, _FIRST_OF_JANUARY_1980, checksum, see, see, len(name), 20)
        return struct.pack("<4s5H3L2H", b"PK\3\4", *fixed) + name + struct.pack("<2H2Q", 1, 16, size, size)

    def _directory(self, place: int) -> bytes:
        """The end of the archive, which is written at `place`."""
        see, version = _SEE_EXTRA_FIELD, _VERSION_WITH_64_BITS
        entries = b""
        for name, size, checksum, start in self._entries():
            fixed = (version, version, 0, 0, 0, _FIRST_OF_JANUARY_1980, checksum, see, see, len(name), 28)
            entries += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fixed, 0, 0, 0, 0, see) + name
            entries += struct.pack("<2H3Q", 1, 24, size, size, start)
        count, length = len(self._entries()), len(entries)
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, version, version, 0, 0, count, count, length, place)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, place + length, 1)
        return entries + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, see, see, 0)


def stored_tokens(path: Path) -> int:
    """How many tokens a finished file has."""
    with ZipFile(path) as archive, archive.open("probabilities.npy") as rows:
        np.lib.format.read_magic(rows)
        shape, _, _ = np.lib.format.read_array_header_2_0(rows)
    return int(shape[0])


def stored_bytes(tokens: int, layers: int, experts: int) -> int:
    """Size of the file, but for a few hundred bytes."""
    return 2 * tokens * layers * experts
