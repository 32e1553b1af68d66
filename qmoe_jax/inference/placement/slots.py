"""Slots for packed experts in host memory; a slot holds one expert of any layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from pallas_kernels import DecodeTable, PackedMatrix
from qmoe_jax.artifact.groups import ExpertExtent, GroupFile, StoredPart
from qmoe_jax.artifact.scatter import ScatterRead, scatter_read
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.finite import require_finite


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """Layout of one matrix `[out, in]` of an expert with at most `capacity` codewords."""

    rows: int
    width: int
    capacity: int
    code_dtype: np.dtype
    level_dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codewords, row offsets and levels of one slot."""
        return (
            self.capacity * self.code_dtype.itemsize
            + (self.rows + 1) * np.dtype(np.int32).itemsize
            + 2 * self.rows * self.level_dtype.itemsize
        )

    def similar(self, other: MatrixLayout) -> bool:
        """Return whether the layouts differ only in their capacity."""
        return dataclasses.replace(self, capacity=other.capacity) == other


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Layout of a slot: the matrices of one expert, by name."""

    matrices: Mapping[str, MatrixLayout]

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def similar(self, other: SlotLayout) -> bool:
        """Return whether the layouts differ only in their capacities."""
        return self.matrices.keys() == other.matrices.keys() and all(
            matrix.similar(other.matrices[name]) for name, matrix in self.matrices.items()
        )

    def join(self, other: SlotLayout) -> SlotLayout:
        """Return the smallest layout that holds either of two similar layouts."""
        larger = {
            name: max(matrix, other.matrices[name], key=lambda layout: layout.capacity)
            for name, matrix in self.matrices.items()
        }
        return SlotLayout(larger)

    @classmethod
    def of(cls, files: Iterable[GroupFile]) -> SlotLayout:
        """Return the smallest layout that holds any expert of the group files.

        Raises:
            CheckpointError: the groups are not all packed in one way (ternary, one pair of levels per row).
        """
        joined: SlotLayout | None = None
        for file in files:
            found = _layout(file)
            if joined is not None and not joined.similar(found):
                raise CheckpointError("differs from its layer's other groups", path=file.path)
            joined = found if joined is None else joined.join(found)
        if joined is None:
            raise ValueError("SlotLayout.of: expected at least one group file, found none")
        return joined


def _layout(file: GroupFile) -> SlotLayout:
    lengths = (file.offsets[:, 1:-1] - file.offsets[:, :-2]).max(0)
    slots = {(slot.matrix, slot.part): (slot, int(n)) for slot, n in zip(file.parts, lengths, strict=True)}
    matrices = {}
    for name, (_, (rows, width)) in file.matrices.items():
        codes, nbytes = slots[name, "codes"]
        levels, _ = slots[name, "levels"]
        capacity = nbytes // codes.dtype.itemsize
        matrices[name] = MatrixLayout(rows, width, capacity, codes.dtype, levels.dtype)
    return SlotLayout(matrices)


class SlotPool:
    """A fixed number of slots in host memory; pages are touched only when an expert is read into them.

    Attributes:
        layout: layout of each slot.
        slots: number of slots.
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
        """Return views of all slots as packed matrices, given the decode table of each matrix."""
        return {
            name: PackedMatrix(
                self._codes[name], self._offsets[name], self._levels[name], tables[name], matrix.width
            )
            for name, matrix in self.layout.matrices.items()
        }

    def fill(self, slot: int, extent: ExpertExtent) -> SlotRead:
        """Return the read that fills a slot with an expert; the slot is valid once `finish` has returned."""
        counts: dict[str, np.ndarray] = {}

        def destination(tensor: StoredPart, length: int) -> np.ndarray:
            name = tensor.matrix
            if tensor.part == "codes":
                return self._codes[name][slot, :length]
            if tensor.part == "levels":
                return self._levels[name][slot]
            counts[name] = np.empty(length, tensor.dtype)
            return counts[name]

        read = scatter_read(extent, destination)
        offsets = {name: array[slot] for name, array in self._offsets.items()}
        levels = {name: array[slot] for name, array in self._levels.items()}
        return SlotRead(extent, read, counts, offsets, levels)


@dataclasses.dataclass(frozen=True)
class SlotRead:
    """A pending read of an expert into a slot: run `read` (or the parts it is split into), then `finish`.

    Attributes:
        extent: file and byte range of the expert.
        read: reads levels and codewords into the slot, and `counts` (codewords per row) beside it.
        offsets: row offsets of the slot, which `finish` computes.
        levels: levels of the slot.
    """

    extent: ExpertExtent
    read: ScatterRead
    counts: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]
    levels: Mapping[str, np.ndarray]

    def complete(self) -> None:
        """Run the read and finish it."""
        self.read.run()
        self.finish()

    def finish(self) -> None:
        """Compute row offsets from the counts, and check the levels.

        Raises:
            CheckpointError: the counts do not add up to the stored codewords, or a level is not finite.
        """
        group, expert = self.extent.group, self.extent.expert
        for name, levels in self.levels.items():
            require_finite(levels, path=self.extent.path, key=f"expert {expert}, {name}, levels")
        begins = group.offsets[expert - group.key.start]
        for tensor, begin, end in zip(group.parts, begins[:-2], begins[1:-1], strict=True):
            if tensor.part == "codes":
                offsets, stored = self.offsets[tensor.matrix], int(end - begin) // tensor.dtype.itemsize
                np.cumsum(self.counts[tensor.matrix], dtype=np.int32, out=offsets[1:])
                if offsets[-1] != stored:
                    raise CheckpointError(
                        "is damaged",
                        path=self.extent.path,
                        key=f"expert {expert}, {tensor.matrix}",
                        expected=f"counts that add up to {stored} codewords",
                        found=int(offsets[-1]),
                        remedy="copy the file again",
                    )
