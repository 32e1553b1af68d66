"""The walk along the trie on NumPy arrays, compiled by numba; rows in parallel.

Encoding waits, for each symbol, for the load that the one before it led to. So a thread walks several rows in
turn, and nothing branches on where a codeword ends: the code is always written, and written over unless one
ended.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt8, UInt16

from pallas_kernels.cpu.compiled import as_index, compiled, read_only
from pallas_kernels.cpu.threads import next_chunk, parallel_for
from pallas_kernels.encode_rows.operands import EncodeTable

_ROWS = 8  # walked in turn by one thread: enough for the loads' latency
_JOINED_ROWS = 64  # copied by one thread at a time

Codes = UInt8[np.ndarray, "codeword"] | UInt16[np.ndarray, "codeword"]


def encode_matrix(
    digits: UInt8[np.ndarray, "row width"],
    table: EncodeTable,
    codes: Codes,
    row_offsets: Int32[np.ndarray, "bound"],
) -> None:
    """Write the codes of a matrix, zeros behind them, and its row offsets.

    It takes a code per symbol of scratch memory.

    The digits are known to be 0, 1 or 2: they lead through the table unchecked. `codes` has room for a code
    per symbol. All arrays are NumPy's.
    """
    rows, width = digits.shape
    follow, code, last_code = map(read_only, (table.follow, table.code, table.last_code))
    scratch, counts = np.empty((rows, table.symbols(width)), code.dtype), np.zeros(rows, np.int64)
    # Its number of dimensions is compiled in, and with it the loop over a symbol's digits.
    symbol = np.empty((0,) * table.symbol_digits, np.uint8)
    tables = follow.reshape(-1), code, last_code
    parallel_for(_encode_rows, read_only(digits), tables, symbol, scratch, counts)
    row_offsets[0] = 0
    np.cumsum(counts, dtype=np.int32, out=row_offsets[1:])
    parallel_for(_join_rows, scratch, row_offsets, codes)
    codes[row_offsets[-1] :] = 0


@compiled
def _symbol_at(row, place, symbol):
    """Return the digits from `place` on as one symbol; zeros follow a row."""
    value, weight = as_index(0), as_index(1)
    for j in range(symbol.ndim):
        if place + as_index(j) < as_index(len(row)):
            value += weight * as_index(row[place + as_index(j)])
        weight *= as_index(3)
    return value


@compiled
def _encode_some(digits, span, tables, symbol, scratch, counts):
    follow, code, last_code = tables
    step, fanout = as_index(symbol.ndim), as_index(3**symbol.ndim)
    nodes = np.zeros(_ROWS, np.int32)
    for i in range(scratch.shape[1]):
        for k in range(span[0], span[1]):
            row, node = as_index(k), as_index(nodes[as_index(k - span[0])])
            reached = follow[node * fanout + _symbol_at(digits[row], as_index(i) * step, symbol)]
            scratch[row, as_index(counts[row])] = code[node]
            counts[row] += np.int64(reached < 0)
            nodes[as_index(k - span[0])] = reached ^ (reached >> 31)  # ~reached where negative
    for k in range(span[0], span[1]):
        scratch[k, counts[k]] = last_code[nodes[k - span[0]]]
        counts[k] += 1


@compiled
def _encode_rows(counter, digits, tables, symbol, scratch, counts):
    rows = len(digits)
    chunk = next_chunk(counter)
    while chunk * _ROWS < rows:
        first = chunk * _ROWS
        _encode_some(digits, (first, min(first + _ROWS, rows)), tables, symbol, scratch, counts)
        chunk = next_chunk(counter)


@compiled
def _join_rows(counter, scratch, offsets, codes):
    rows = len(offsets) - 1
    chunk = next_chunk(counter)
    while chunk * _JOINED_ROWS < rows:
        for row in range(chunk * _JOINED_ROWS, min((chunk + 1) * _JOINED_ROWS, rows)):
            start = offsets[row]
            for i in range(min(offsets[row + 1], len(codes)) - start):
                codes[start + i] = scratch[row, i]
        chunk = next_chunk(counter)
