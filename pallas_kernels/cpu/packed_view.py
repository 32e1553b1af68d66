"""Packed matrices as compiled code reads them, within bounds that hold whatever their arrays contain."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt32

from pallas_kernels.cpu.compiled import as_index, compiled, read_only
from pallas_kernels.operands import DIGIT_BITS, DecodeTable, PackedMatrix

SINGLE_STEP, LANES_STEP = 3, 4
"""Factors of the position in the fields of `single_entries` and `lane_entries`; see `inner_loop`."""

_CACHED_TABLES = 8  # a model has one or a few; that of upstream's dictionary takes 768 KB


class PackedView(NamedTuple):
    """A `PackedMatrix` as compiled functions read it; the arrays are read-only and contiguous.

    Both tables hold the decode table's words with the fields moved: from the lowest bit on, for each slot,
    `step` times the position plus the digit (`field_bits + DIGIT_BITS` bits), then the codeword's length.
    They have as many entries as there are values of a code: those beyond the decode table repeat its last, so
    that no code leads out of bounds.

    numba compiles an array's number of dimensions into the code, not an integer's value: `field_bits`,
    `slots` and `words` are empty arrays of as many dimensions as the numbers that they stand for, so that
    loops over them unroll.

    Attributes:
        codes: uint8 or uint16 [expert, capacity].
        row_offsets: int32 [expert, row + 1].
        level_halves: uint16 [expert, row, 2 or 4], the levels' 16-bit halves, the lower one first.
        single_entries: uint32 [code * words] of step `SINGLE_STEP`, for blocks of one token.
        lane_entries: uint32 [code * words] of step `LANES_STEP`, for blocks of lanes.
        field_bits: stands for the bits of a position.
        slots: stands for the nonzeros per word.
        words: stands for the words per codeword.
        max_length: digits of the longest codeword.
        width: columns of the matrix.
    """

    codes: Any
    row_offsets: Any
    level_halves: Any
    single_entries: Any
    lane_entries: Any
    field_bits: Any
    slots: Any
    words: Any
    max_length: int
    width: int


def view_packed(packed: PackedMatrix) -> PackedView:
    """Return a view of a matrix of NumPy arrays, which are copied only where they are not contiguous."""
    table, codes = packed.table, read_only(packed.codes)
    return PackedView(
        codes,
        read_only(packed.row_offsets),
        read_only(np.asarray(packed.levels).view(np.uint16)),
        *_moved_entries(table, codes.dtype),
        np.empty((0,) * table.field_bits, np.uint8),
        np.empty((0,) * table.slots, np.uint8),
        np.empty((0,) * table.words, np.uint8),
        table.max_length,
        packed.width,
    )


_EntriesPair = tuple[UInt32[np.ndarray, "entry"], UInt32[np.ndarray, "entry"]]
_cached_entries: list[tuple[tuple[Any, ...], _EntriesPair]] = []


def _moved_entries(table: DecodeTable, code: np.dtype) -> _EntriesPair:
    """Return a table's entries for single tokens and for lanes, cached by its contents."""
    key = code, table.field_bits, table.slots, table.words, np.asarray(table.entries).tobytes()
    for cached_key, entries in _cached_entries:
        if cached_key == key:
            return entries
    entries = _move_fields(table, code, SINGLE_STEP), _move_fields(table, code, LANES_STEP)
    _cached_entries.insert(0, (key, entries))
    del _cached_entries[_CACHED_TABLES:]
    return entries


def _move_fields(table: DecodeTable, code: np.dtype, step: int) -> UInt32[np.ndarray, "entry"]:
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
def open_row(matrix, expert, row, level_bits):
    """Return the range of a row's codewords, held within the capacity, and write its levels.

    `level_bits`, uint32 [4], receives the levels as bits of float32 at the index of their digit, 1 or 2.
    """
    halves = matrix.level_halves.shape[2] // 2
    for digit in range(1, 3):  # a bfloat16 is the upper half of a float32
        level_bits[digit] = np.uint32(matrix.level_halves[expert, row, halves * digit - 1]) << np.uint32(16)
        if halves == 2:
            level_bits[digit] |= np.uint32(matrix.level_halves[expert, row, 2 * digit - 2])
    capacity = np.int64(matrix.codes.shape[1])
    start: Any = min(max(np.int64(matrix.row_offsets[expert, row]), 0), capacity)
    stop: Any = min(max(np.int64(matrix.row_offsets[expert, row + 1]), start), capacity)
    return as_index(start), as_index(stop)


@compiled
def entry_word(matrix, entries, code, word):
    """Return one of the `words` of a code's entry."""
    return entries[as_index(code) * as_index(matrix.words.ndim) + as_index(word)]


@compiled
def slot_field(matrix, word, slot):
    """Return the field of one of a word's slots: step times the position plus the digit."""
    bits = matrix.field_bits.ndim + DIGIT_BITS
    return as_index((word >> np.uint32(slot * bits)) & np.uint32((1 << bits) - 1))


@compiled
def codeword_length(matrix, word):
    """Return the number of digits of the codeword, which each of its words holds."""
    return as_index(word >> np.uint32(matrix.slots.ndim * (matrix.field_bits.ndim + DIGIT_BITS)))
