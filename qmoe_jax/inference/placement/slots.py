"""Room for packed experts in host memory: a slot holds one expert, of whichever layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from pallas_kernels import DecodeTable, PackedMatrix
from qmoe_jax.artifact.groups import ExpertExtent, GroupFile, Slot
from qmoe_jax.artifact.scatter import ScatterRead, scatter_read
from qmoe_jax.files.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """What one matrix [out, in] of an expert takes: room for `capacity` codewords at most."""

    rows: int
    width: int
    capacity: int
    code_dtype: np.dtype
    level_dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a slot's codewords, row offsets and levels."""
        return (
            self.capacity * self.code_dtype.itemsize
            + (self.rows + 1) * np.dtype(np.int32).itemsize
            + 2 * self.rows * self.level_dtype.itemsize
        )

    def similar(self, other: MatrixLayout) -> bool:
        """Whether both differ in the capacity alone."""
        return dataclasses.replace(self, capacity=other.capacity) == other


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """What a slot holds: the matrices of an expert, by name."""

    matrices: Mapping[str, MatrixLayout]

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def similar(self, other: SlotLayout) -> bool:
        """Whether both differ in capacities alone."""
        return self.matrices.keys() == other.matrices.keys() and all(
            matrix.similar(other.matrices[name]) for name, matrix in self.matrices.items()
        )

    def join(self, other: SlotLayout) -> SlotLayout:
        """Room for either of two similar layouts."""
        larger = {
            name: max(matrix, other.matrices[name], key=lambda layout: layout.capacity)
            for name, matrix in self.matrices.items()
        }
        return SlotLayout(larger)

    @classmethod
    def of(cls, files: Iterable[GroupFile]) -> SlotLayout:
        """Room for any expert of some group files, all packed in one way (ternary, levels a row).

        Raises:
          CheckpointError: they are not.
        """
        joined: SlotLayout | None = None
        for file in files:
            found = _layout(file)
            if joined is not None and not joined.similar(found):
                raise CheckpointError("differs from its layer's other groups", path=file.path)
            joined = found if joined is None else joined.join(found)
        if joined is None:
            raise ValueError("expected one group file or more, found none")
        return joined


def _layout(file: GroupFile) -> SlotLayout:
    lengths = (file.offsets[:, 1:-1] - file.offsets[:, :-2]).max(0)
    slots = {(slot.matrix, slot.part): (slot, int(n)) for slot, n in zip(file.slots, lengths, strict=True)}
    matrices = {}
    for name, (_, (rows, width)) in file.matrices.items():
        codes, nbytes = slots[name, "codes"]
        levels, _ = slots[name, "levels"]
        capacity = nbytes // codes.dtype.itemsize
        matrices[name] = MatrixLayout(rows, width, capacity, codes.dtype, levels.dtype)
    return SlotLayout(matrices)


class SlotPool:
    """A fixed number of slots. Pages of memory that no expert was read into are never touched.

    Attributes:
      layout: what a slot holds.
      slots: how many there are.
    """

    def __init__(self, layout: SlotLayout, slots: int):
        self.layout, self.slots = layout, slots
        self._codes, self._offsets, self._levels = {}, {}, {}
        for name, matrix in layout.matrices.items():
            self._codes[name] = np.zeros((slots, matrix.capacity), matrix.code_dtype)
            self._offsets[name] = np.zeros((slots, matrix.rows + 1), np.int32)
            self._levels[name] = np.zeros((slots, matrix.rows, 2), matrix.level_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.layout.nbytes

    def packed(self, tables: Mapping[str, DecodeTable]) -> dict[str, PackedMatrix]:
        """The slots as the kernels take experts, given what the codewords of each matrix mean."""
        return {
            name: PackedMatrix(
                self._codes[name], self._offsets[name], self._levels[name], tables[name], matrix.width
            )
            for name, matrix in self.layout.matrices.items()
        }

    def fill(self, slot: int, extent: ExpertExtent) -> SlotRead:
        """The read that brings an expert into a slot; the slot is the expert's when it has run and finished."""
        counts: dict[str, np.ndarray] = {}

        def destination(tensor: Slot, length: int) -> np.ndarray:
            name = tensor.matrix
            if tensor.part == "codes":
                return self._codes[name][slot, :length]
            if tensor.part == "levels":
                return self._levels[name][slot]
            counts[name] = np.empty(length, tensor.dtype)
            return counts[name]

        read = scatter_read(extent, destination)
        offsets = {name: array[slot] for name, array in self._offsets.items()}
        return SlotRead(extent, read, counts, offsets)


@dataclasses.dataclass(frozen=True)
class SlotRead:
    """An expert on its way into a slot: run `read` (or the parts it is split into), then `finish`.

    Attributes:
      extent: where the expert lies.
      read: brings levels and codewords to the slot, and `counts` (codewords a row) beside it.
      offsets: the slot's own, which `finish` writes.
    """

    extent: ExpertExtent
    read: ScatterRead
    counts: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]

    def complete(self) -> None:
        """Reads and finishes."""
        self.read.run()
        self.finish()

    def finish(self) -> None:
        """Makes row offsets of the counts. Raises `CheckpointError` where they are not those of the codewords."""
        group = self.extent.group
        begins = group.offsets[self.extent.expert - group.key.start]
        for tensor, begin, end in zip(group.slots, begins[:-2], begins[1:-1], strict=True):
            if tensor.part == "codes":
                offsets, stored = self.offsets[tensor.matrix], int(end - begin) // tensor.dtype.itemsize
                np.cumsum(self.counts[tensor.matrix], dtype=np.int32, out=offsets[1:])
                if offsets[-1] != stored:
                    raise CheckpointError(
                        "is damaged",
                        path=self.extent.path,
                        key=f"expert {self.extent.expert}, {tensor.matrix}",
                        expected=f"counts that add up to {stored} codewords",
                        found=int(offsets[-1]),
                        remedy="copy the file again",
                    )
