"""The walk along the trie on NumPy arrays, compiled by numba; rows in parallel.

Encoding waits, for each symbol, for the load that the one before it led to. So a thread walks several rows in turn,
and nothing branches on where a codeword ends: the code is always written, and written over unless one ended.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Int32, UInt8, UInt16

from pallas_kernels.cpu.compiled import compiled, parallel
from pallas_kernels.encode_rows.operands import EncodeTable
from pallas_kernels.operands import AnyArray

_ROWS = 8  # walked in turn by one thread: enough for the loads' latency
_index = np.uintp  # unsigned: numba checks signed indices for counting from the end

Codes = UInt8[np.ndarray, "codeword"] | UInt16[np.ndarray, "codeword"]


def encode_matrix(
    digits: UInt8[np.ndarray, "row width"],
    table: EncodeTable,
    codes: Codes,
    row_offsets: Int32[np.ndarray, "bound"],
) -> None:
    """Write the codes of a matrix, zeros behind them, and its row offsets. Takes a code per symbol of scratch memory.

    The digits are known to be 0, 1 or 2: they lead through the table unchecked. `codes` has room for a code per
    symbol. All arrays are NumPy's.
    """
    rows, width = digits.shape
    follow, code, last_code = map(_read_only, (table.follow, table.code, table.last_code))
    scratch, counts = np.empty((rows, table.symbols(width)), code.dtype), np.zeros(rows, np.int64)
    # Its number of dimensions is compiled in, and with it the loop over a symbol's digits.
    symbol = np.empty((0,) * table.symbol_digits, np.uint8)
    _encode_rows(_read_only(digits), (follow.reshape(-1), code, last_code), symbol, scratch, counts)
    row_offsets[0] = 0
    np.cumsum(counts, dtype=np.int32, out=row_offsets[1:])
    _join_rows(scratch, row_offsets, codes)
    codes[row_offsets[-1] :] = 0


def _read_only(array: AnyArray) -> np.ndarray:
    """Return a contiguous and read-only view, like XLA's arrays, so that one compiled version serves all callers."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


@compiled
def _symbol_at(row, place, symbol):
    """Return the digits from `place` on as one symbol; zeros follow a row."""
    value, weight = _index(0), _index(1)
    for j in range(symbol.ndim):
        if place + _index(j) < _index(len(row)):
            value += weight * _index(row[place + _index(j)])
        weight *= _index(3)
    return value


@compiled
def _encode_some(digits, span, tables, symbol, scratch, counts):
    follow, code, last_code = tables
    step, fanout = _index(symbol.ndim), _index(3**symbol.ndim)
    nodes = np.zeros(_ROWS, np.int32)
    for i in range(scratch.shape[1]):
        for k in range(span[0], span[1]):
            row, node = _index(k), _index(nodes[_index(k - span[0])])
            reached = follow[node * fanout + _symbol_at(digits[row], _index(i) * step, symbol)]
            scratch[row, _index(counts[row])] = code[node]
            counts[row] += np.int64(reached < 0)
            nodes[_index(k - span[0])] = reached ^ (reached >> 31)  # ~reached where negative
    for k in range(span[0], span[1]):
        scratch[k, counts[k]] = last_code[nodes[k - span[0]]]
        counts[k] += 1


@parallel
def _encode_rows(digits, tables, symbol, scratch, counts):
    rows = len(digits)
    for group in numba.prange((rows + _ROWS - 1) // _ROWS):
        first = group * _ROWS
        _encode_some(digits, (first, min(first + _ROWS, rows)), tables, symbol, scratch, counts)


@parallel
def _join_rows(scratch, offsets, codes):
    for row in numba.prange(len(offsets) - 1):
        start = offsets[row]
        for i in range(offsets[row + 1] - start):
            codes[start + i] = scratch[row, i]
