"""Reading of one expert straight into the memory where it is used, without another copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qmoe_jax.artifact.groups import ExpertExtent, StoredPart
from qmoe_jax.files.store import File

Destination = Callable[[StoredPart, int], np.ndarray]
"""Returns the contiguous array that a part of the expert is read into, given its number of elements."""


@dataclasses.dataclass(frozen=True)
class ScatterRead:
    """A range of a file, and the pieces of memory that it fills in order.

    Attributes:
        file: the file.
        nbytes: size of the whole file; a local file of any other size is not the one that was opened.
        offset: beginning of the range in the file, in bytes.
        pieces: writable bytes.
    """

    file: File
    nbytes: int
    offset: int
    pieces: tuple[memoryview, ...]

    @property
    def size(self) -> int:
        """Size of the range in bytes."""
        return sum(map(len, self.pieces))

    def split(self, parts: int) -> Iterator[ScatterRead]:
        """Yield the same range as at most `parts` reads of about equal size, which may run at once."""
        share = max(1, -(-self.size // parts))
        for begin in range(0, self.size, share):
            pieces = tuple(_cut(self.pieces, begin, begin + share))
            yield dataclasses.replace(self, offset=self.offset + begin, pieces=pieces)

    def run(self) -> None:
        """Read; the GIL is free meanwhile.

        Raises:
            CheckpointError: the file is missing, of another size than it was, or cannot be read.
        """
        self.file.store.read_into(self.file.name, self.offset, self.pieces, file_size=self.nbytes)


def _cut(pieces: tuple[memoryview, ...], begin: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes `begin` to `end` of the pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, begin - position) : max(0, end - position)]
        if len(part):
            yield part
        position += len(piece)


def scatter_read(extent: ExpertExtent, destination: Destination) -> ScatterRead:
    """Return the read that fills the destinations of all parts of an expert, without the padding behind them.

    Raises:
        ValueError: a destination has another number of bytes than the part.
    """
    group = extent.group
    begins = group.offsets[extent.expert - group.key.start].tolist()
    pieces = []
    for stored, begin, end in zip(group.parts, begins[:-2], begins[1:-1], strict=True):
        array = destination(stored, (end - begin) // stored.dtype.itemsize)
        piece = array.reshape(-1).view(np.uint8).data
        if len(piece) != end - begin:
            expected = f"{end - begin} bytes for {stored.matrix}.{stored.part}"
            raise ValueError(
                f"{extent.path}, expert {extent.expert}: expected {expected}, found {len(piece)}"
            )
        pieces.append(piece)
    return ScatterRead(extent.file, group.nbytes, extent.offset, tuple(pieces))
