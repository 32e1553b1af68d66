"""Packed matrices written out as dense ones."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from pallas_kernels.cpu.compiled import as_index, compiled
from pallas_kernels.cpu.packed_view import (
    LANES_STEP,
    codeword_length,
    entry_word,
    open_row,
    slot_field,
    view_packed,
)
from pallas_kernels.cpu.threads import next_chunk, parallel_for
from pallas_kernels.operands import PackedMatrix

_CHUNK_ROWS = 32


def unpack_rows(packed: PackedMatrix, y: Float32[np.ndarray, "expert out in"]) -> None:
    """Write matrices of NumPy arrays into `y`, rows in parallel; from any thread, without other memory."""
    parallel_for(_unpack_chunks, view_packed(packed), y)


@compiled
def _unpack_chunks(counter, matrix, y):
    rows = y.shape[1]
    chunks = -(-rows // _CHUNK_ROWS)
    chunk = next_chunk(counter)
    while chunk < y.shape[0] * chunks:
        expert, first = chunk // chunks, chunk % chunks * _CHUNK_ROWS
        for row in range(first, min(first + _CHUNK_ROWS, rows)):
            _unpack_row(matrix, expert, row, y[expert, row])
        chunk = next_chunk(counter)


@compiled
def _unpack_row(matrix, expert, row, y):
    level_bits = np.zeros(4, np.uint32)
    level = level_bits.view(np.float32)
    start, stop = open_row(matrix, expert, row, level_bits)
    begin, y[:] = as_index(0), 0
    for i in range(start, stop):
        code, length = matrix.codes[expert, i], as_index(0)
        for w in range(matrix.words.ndim):
            word = entry_word(matrix, matrix.lane_entries, code, w)
            length = codeword_length(matrix, word)
            for slot in range(matrix.slots.ndim):
                field = slot_field(matrix, word, slot)
                column, digit = begin + field // as_index(LANES_STEP), field % as_index(LANES_STEP)
                if digit != 0 and column < len(y):
                    y[column] = level[digit]
        begin = min(begin + length, as_index(len(y)))
