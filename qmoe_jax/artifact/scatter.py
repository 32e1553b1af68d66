"""One expert read straight to where it will be used: no byte of it is copied twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qmoe_jax.artifact.groups import ExpertExtent, Slot
from qmoe_jax.files.reading import read_into

Destination = Callable[[Slot, int], np.ndarray]
"""Given a tensor of the expert and its number of elements: the contiguous array that it is read into."""


@dataclasses.dataclass(frozen=True)
class ScatterRead:
    """A range of a file, and the pieces of memory that it fills one after another.

    Attributes:
      path: the file.
      nbytes: its whole size; a file of any other size is not the one that was opened.
      offset: where the range begins.
      pieces: writable bytes.
    """

    path: Path
    nbytes: int
    offset: int
    pieces: tuple[memoryview, ...]

    @property
    def size(self) -> int:
        """Bytes of the range."""
        return sum(map(len, self.pieces))

    def split(self, parts: int) -> Iterator[ScatterRead]:
        """The same range as at most `parts` reads of about equal size, which may run at once."""
        share = max(1, -(-self.size // parts))
        for begin in range(0, self.size, share):
            pieces = tuple(_cut(self.pieces, begin, begin + share))
            yield dataclasses.replace(self, offset=self.offset + begin, pieces=pieces)

    def run(self) -> None:
        """Reads; the GIL is free meanwhile.

        Raises:
          CheckpointError: the file is missing, of another size than it was, or cannot be read.
        """
        read_into(self.path, self.offset, self.pieces, file_size=self.nbytes)


def _cut(pieces: tuple[memoryview, ...], begin: int, end: int) -> Iterator[memoryview]:
    """What lies between two bytes of the pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, begin - position) : max(0, end - position)]
        if len(part):
            yield part
        position += len(piece)


def scatter_read(extent: ExpertExtent, destination: Destination) -> ScatterRead:
    """The read that brings every tensor of an expert to its destination (the padding behind them is left out).

    Raises:
      ValueError: a destination has another number of bytes than the tensor.
    """
    group = extent.group
    begins = group.offsets[extent.expert - group.key.start].tolist()
    pieces = []
    for slot, begin, end in zip(group.slots, begins[:-2], begins[1:-1], strict=True):
        array = destination(slot, (end - begin) // slot.dtype.itemsize)
        piece = array.reshape(-1).view(np.uint8).data
        if len(piece) != end - begin:
            expected = f"{end - begin} bytes for {slot.matrix}.{slot.part}"
            raise ValueError(
                f"{extent.path}, expert {extent.expert}: expected {expected}, found {len(piece)}"
            )
        pieces.append(piece)
    return ScatterRead(extent.path, group.nbytes, extent.offset, tuple(pieces))
