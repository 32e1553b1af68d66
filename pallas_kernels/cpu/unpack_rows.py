"""Rows of codewords as dense rows."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from pallas_kernels.cpu.codebook_tables import entry_of, field_of, length_of, open_row, stream
from pallas_kernels.cpu.compiled import compiled
from pallas_kernels.cpu.threads import share, take
from pallas_kernels.operands import PackedMatrix

_ROWS = 32  # of a piece

_index = np.uintp


def dense(packed: PackedMatrix, y: Float32[np.ndarray, "expert out in"]) -> None:
    """Writes the matrices into `y`."""
    share(_dense, stream(packed), y)


@compiled
def _dense(taken, matrix, y):
    rows = y.shape[1]
    pieces = -(-rows // _ROWS)
    number = take(taken)
    while number < y.shape[0] * pieces:
        expert, first = number // pieces, number % pieces * _ROWS
        for row in range(first, min(first + _ROWS, rows)):
            _write_row(matrix, expert, row, y[expert, row])
        number = take(taken)


@compiled
def _write_row(matrix, expert, row, y):
    bits = np.zeros(4, np.uint32)
    level = bits.view(np.float32)
    start, stop = open_row(matrix, expert, row, bits)
    at, y[:] = _index(0), 0
    for i in range(start, stop):
        code, length = matrix.codes[expert, i], _index(0)
        for word in range(matrix.words.ndim):
            entry = entry_of(matrix, matrix.entries, code, word)
            length = length_of(matrix, entry)
            for slot in range(matrix.slots.ndim):
                place = field_of(matrix, entry, slot)
                column, digit = at + (place >> _index(2)), place & _index(3)
                if digit != 0 and column < len(y):
                    y[column] = level[digit]
        at = min(at + length, _index(len(y)))
