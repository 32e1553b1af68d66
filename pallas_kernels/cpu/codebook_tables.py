"""A packed matrix as compiled code reads it, and the bounds that hold whatever its arrays do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt32

from pallas_kernels.cpu.compiled import compiled
from pallas_kernels.operands import DIGIT_BITS, DecodeTable, PackedMatrix

_index, _word = np.uintp, np.uint32  # unsigned: numba checks signed indices for counting from the end

_RECENT = 8  # tables kept in the kernels' form


class Stream(NamedTuple):
    """A packed matrix as compiled functions read it.

    `field_bits`, `slots` and `words` are empty arrays of so many dimensions: numba compiles those numbers in.

    `pair_entries` and `entries` are the table's with their fields moved: from the lowest bit on, for each slot, 3
    or 4 times the position plus the digit, then the length. There are as many as codes could say, those beyond the
    table repeating its last.
    """

    codes: Any
    offsets: Any
    level_halves: Any
    pair_entries: Any
    entries: Any
    field_bits: Any
    slots: Any
    words: Any
    max_length: int
    width: int


def stream(packed: PackedMatrix) -> Stream:
    """Its arrays read-only and contiguous, so that one compiled version serves everybody."""
    table, levels, codes = packed.table, np.asarray(packed.levels), frozen(packed.codes)
    return Stream(
        codes,
        frozen(packed.row_offsets),
        frozen(levels.view(np.uint16)),
        *_entries(table, codes.dtype),
        np.empty((0,) * table.field_bits, np.uint8),
        np.empty((0,) * table.slots, np.uint8),
        np.empty((0,) * table.words, np.uint8),
        table.max_length,
        packed.width,
    )


def frozen(array: Any) -> np.ndarray:
    """A contiguous view to read: XLA's buffers and NumPy's arrays are then of one type to numba."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


_Entries = tuple[UInt32[np.ndarray, "number"], UInt32[np.ndarray, "number"]]
_recent: list[tuple[tuple[Any, ...], _Entries]] = []


def _entries(table: DecodeTable, code: np.dtype) -> _Entries:
    """The table's entries as a `Stream` wants them, from the last ones made where they are the same."""
    key = code, table.field_bits, table.slots, table.words, np.asarray(table.entries).tobytes()
    for known, found in _recent:
        if known == key:
            return found
    made = _moved(table, code, 3), _moved(table, code, 4)
    _recent.insert(0, (key, made))
    del _recent[_RECENT:]
    return made


def _moved(table: DecodeTable, code: np.dtype, step: int) -> UInt32[np.ndarray, "number"]:
    bits, field_bits = table.field_bits, table.field_bits + DIGIT_BITS
    words = np.asarray(table.entries)
    mask = np.uint32((1 << bits) - 1)
    moved = (words & mask) << np.uint32(table.slots * field_bits)
    for slot in range(table.slots):
        field = words >> np.uint32(bits + slot * field_bits)
        place = (field & mask) * np.uint32(step) + (field >> np.uint32(bits) & np.uint32(3))
        moved |= place << np.uint32(slot * field_bits)
    codes = np.arange(np.iinfo(code).max + 1)
    return moved[np.minimum(codes, len(moved) - 1)].reshape(-1)


@compiled
def open_row(matrix, expert, row, bits):
    """The range of a row's codewords; its levels go to `bits`, float32 patterns, under their digits."""
    each = matrix.level_halves.shape[2] // 2
    for digit in range(1, 3):  # a bfloat16 is the upper half of a float32
        bits[digit] = _word(matrix.level_halves[expert, row, each * digit - 1]) << _word(16)
        if each == 2:
            bits[digit] |= _word(matrix.level_halves[expert, row, 2 * digit - 2])
    capacity = np.int64(matrix.codes.shape[1])
    start: Any = min(max(np.int64(matrix.offsets[expert, row]), 0), capacity)
    stop: Any = min(max(np.int64(matrix.offsets[expert, row + 1]), start), capacity)
    return _index(start), _index(stop)


@compiled
def entry_of(matrix, entries, code, word):
    """A word of a codeword's entry."""
    return entries[_index(code) * _index(matrix.words.ndim) + _index(word)]


@compiled
def field_of(matrix, entry, slot):
    """What one of the slots of an entry says."""
    bits = matrix.field_bits.ndim + DIGIT_BITS
    return _index((entry >> _word(slot * bits)) & _word((1 << bits) - 1))


@compiled
def length_of(matrix, entry):
    """Digits of the codeword."""
    return _index(entry >> _word(matrix.slots.ndim * (matrix.field_bits.ndim + DIGIT_BITS)))
