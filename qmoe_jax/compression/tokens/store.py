"""Hidden states on disk, expert-major: segments of a slab's tokens of one expert group, side by side.

The attention pass of a layer takes slabs in order and the experts take groups in order; either way the states
of one slab and one group are one contiguous segment, so both read and write long runs of bytes, and memory
holds a slab at most, whatever the number of tokens or the load of an expert. A part is a file of segments
with an index beside it, which is written last and holds its own checksum; every segment has a CRC-32 that is
compared whenever it is read.

Nothing is synced: after a power failure what did not reach the disk is found by its checksum, and computed
again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int
from safetensors.numpy import load, save

from qmoe_jax.files.durable import make_folder, write_durably
from qmoe_jax.files.errors import CheckpointError, system_error
from qmoe_jax.files.reading import read_array, read_whole

_VERIFIED = 1 << 22
"""Bytes that are read at a time to verify (4 MiB)."""

_DIGEST = 32
"""Bytes of the SHA-256 that an index ends with."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A contiguous run of hidden states in a file.

    Attributes:
        file: the file.
        offset: its first byte.
        rows: tokens.
        crc: CRC-32 of the bytes.
    """

    file: Path
    offset: int
    rows: int
    crc: int


class PartWriter:
    """Writer of one part; the part counts once `finish` has written its index."""

    def __init__(self, folder: Path, name: str):
        """Begin a part of this name, in place of one that may be there.

        Raises:
            CheckpointError: the system refuses.
        """
        self._file, self._index = folder / name, _index_of(folder, name)
        self._offset = 0
        self._entries: list[list[int]] = []
        try:
            make_folder(folder)
            self._index.unlink(missing_ok=True)
            self._file.write_bytes(b"")
        except OSError as error:
            raise system_error("cannot be written", self._file, error) from error

    def append(self, slab: int, group: int, x: Float32[np.ndarray, "token embed"]) -> None:
        """Write tokens of a segment, right behind those that were written of it just before.

        Raises:
            CheckpointError: the disk is full, or refuses otherwise.
        """
        if not len(x):
            return
        data = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint8).data
        if not self._entries or self._entries[-1][:2] != [slab, group]:
            self._entries.append([slab, group, self._offset, 0, 0])
        entry = self._entries[-1]
        entry[3], entry[4] = entry[3] + len(x), zlib.crc32(data, entry[4])
        self._write(data)

    def append_slab(
        self, slab: int, x: Float32[np.ndarray, "token embed"], group: Int[np.ndarray, "token"]
    ) -> None:
        """Write the tokens of a slab, those of each group together, in the order in which they come."""
        order = np.argsort(group, kind="stable")
        groups, starts = np.unique(group[order], return_index=True)
        for number, part in zip(groups.tolist(), np.split(order, starts[1:]), strict=True):
            self.append(slab, number, x[part])

    def finish(self, **arrays: np.ndarray) -> None:
        """Write the index, with arrays to be kept in it."""
        columns = np.array(self._entries, np.int64).reshape(-1, 5)
        content = save({"segments": columns, **{k: np.ascontiguousarray(v) for k, v in arrays.items()}})
        write_durably(self._index, [content, hashlib.sha256(content).digest()])

    def _write(self, data: memoryview) -> None:
        try:
            with self._file.open("ab", buffering=0) as stream:
                while len(data):
                    written = stream.write(data) or 0
                    data, self._offset = data[written:], self._offset + written
        except OSError as error:
            raise system_error("hidden states cannot be written", self._file, error) from error


class TokenStore:
    """The parts of one folder, to be read.

    Attributes:
        folder: the folder.
        arrays: what the parts keep in their indexes, by the name of the part.
        segments: by (slab, group).
    """

    def __init__(self, folder: Path, names: Iterable[str], features: int):
        """Open the parts of these names. Raises `CheckpointError` where one is missing or damaged."""
        self.folder, self._features = folder, features
        self.arrays: dict[str, Mapping[str, np.ndarray]] = {}
        self.segments: dict[tuple[int, int], Segment] = {}
        for name in names:
            arrays = _read_index(folder, name)
            for slab, group, offset, rows, crc in arrays.pop("segments").tolist():
                self.segments[slab, group] = Segment(folder / name, offset, rows, crc)
            self.arrays[name] = arrays
        self._by_group: dict[int, list[int]] = {}
        for slab, group in sorted(self.segments):
            self._by_group.setdefault(group, []).append(slab)

    def slabs(self, group: int) -> list[int]:
        """Return the slabs with tokens of a group, in order."""
        return self._by_group.get(group, [])

    def read_slab(self, slab: int, group: Int[np.ndarray, "token"]) -> Float32[np.ndarray, "token embed"]:
        """Return the states of a slab in order, given the group of each token. Raises as `pieces`."""
        x = np.empty((len(group), self._features), np.float32)
        order = np.argsort(group, kind="stable")
        groups, starts = np.unique(group[order], return_index=True)
        for number, part in zip(groups.tolist(), np.split(order, starts[1:]), strict=True):
            x[part] = next(self._read(self.segments[slab, number], len(part)))
        return x

    def pieces(self, group: int, slab: int, rows: int) -> Iterator[Float32[np.ndarray, "token embed"]]:
        """Yield a segment in pieces of up to `rows` tokens; its checksum is compared with the last one.

        Raises:
            CheckpointError: the file is cut short, cannot be read, or is damaged.
        """
        yield from self._read(self.segments[slab, group], rows)

    def _read(self, segment: Segment, rows: int) -> Iterator[Float32[np.ndarray, "token embed"]]:
        crc, offset = 0, segment.offset
        for start in range(0, segment.rows, rows):
            piece = np.empty((min(rows, segment.rows - start), self._features), np.float32)
            read_array(segment.file, offset, piece, segment.file.name)
            crc, offset = zlib.crc32(piece.reshape(-1).view(np.uint8).data, crc), offset + piece.nbytes
            if start + len(piece) == segment.rows and crc != segment.crc:
                raise CheckpointError(
                    "hidden states are damaged",
                    path=segment.file,
                    expected=f"CRC-32 {segment.crc:08x} of {segment.rows} tokens from byte {segment.offset}",
                    found=f"{crc:08x}",
                    remedy=f"remove {self.folder}: the run computes them again",
                )
            yield piece

    def verify(self) -> None:
        """Read every segment. Raises `CheckpointError` at the first that is damaged."""
        rows = max(1, _VERIFIED // (4 * self._features))
        for segment in self.segments.values():
            for _ in self._read(segment, rows):
                pass


def part_names(folder: Path) -> list[str]:
    """Return the names of the parts in a folder whose index was written."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}"))


def remove_store(folder: Path) -> None:
    """Remove a folder of parts, indexes first, so that no index outlives its file."""
    for name in part_names(folder):
        _index_of(folder, name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


_SUFFIX = ".index"


def _index_of(folder: Path, name: str) -> Path:
    return folder / f"{name}{_SUFFIX}"


def _read_index(folder: Path, name: str) -> dict[str, np.ndarray]:
    path = _index_of(folder, name)
    data = read_whole(path)
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError("is damaged", path=path, remedy=f"remove {os.fspath(folder)}")
    return dict(load(content))
