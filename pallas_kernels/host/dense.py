"""Rows of codewords as dense rows."""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Float32

from pallas_kernels.host.compiled import parallel
from pallas_kernels.host.rows import nonzeros, open_row, stream
from pallas_kernels.operands import PackedMatrix


def dense(packed: PackedMatrix, y: Float32[np.ndarray, "expert out in"]) -> None:
    """Writes the matrices into `y`."""
    _dense(stream(packed), y)


@parallel
def _dense(matrix, y):
    rows = y.shape[1]
    room = matrix.width + matrix.slots.ndim * matrix.words.ndim
    for expert_row in numba.prange(y.shape[0] * rows):
        expert, row = expert_row // rows, expert_row % rows
        bits = np.zeros(4, np.uint32)
        positions, values = np.empty(room, np.uint32), np.empty(room, np.float32)
        span = open_row(matrix, expert, row, bits)
        read = matrix.codes[expert], bits.view(np.float32)
        count = nonzeros(matrix, read, span, positions, values)
        y[expert, row, :] = 0
        for i in range(count):
            y[expert, row, positions[i]] = values[i]
