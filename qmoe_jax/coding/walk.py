"""The loops of encoding and decoding, compiled by numba; rows in parallel.

Encoding waits, for each symbol, for the load that the one before it led to. So a thread walks several rows in turn,
and nothing branches on where a codeword ends: the code is always written, and written over unless one ended.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Int32, UInt8

from pallas_kernels.host.compiled import compiled, parallel
from qmoe_jax.coding.codebook import Codebook

_ROWS = 8  # walked in turn by one thread: enough for the loads' latency
_index = np.uintp  # unsigned: numba checks signed indices for counting from the end


def encode(digits: UInt8[np.ndarray, "row width"], codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """(codes, number of codewords of each row). Takes one code a symbol of scratch memory for the time."""
    rows, width = digits.shape
    trie, dtype = codebook.trie, codebook.code_dtype
    scratch = np.empty((rows, width // codebook.symbol_digits + 1), dtype)
    counts = np.zeros(rows, np.int64)
    tables = trie.follow.reshape(-1), trie.code.astype(dtype), trie.last_code.astype(dtype)
    # Its number of dimensions is compiled in, and with it the loop over a symbol's digits.
    symbol = np.empty((0,) * codebook.symbol_digits, np.uint8)
    _encode_rows(digits, tables, symbol, scratch, counts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    codes = np.empty(offsets[-1], dtype)
    _join_rows(scratch, offsets, codes)
    return codes, counts


def decode(
    codes: np.ndarray, row_offsets: Int32[np.ndarray, "bound"], codebook: Codebook, width: int
) -> UInt8[np.ndarray, "row width"]:
    """The digits of rows whose codewords are known to cover them."""
    digits = np.empty((len(row_offsets) - 1, width), np.uint8)
    _decode_rows(codes, row_offsets, (codebook.lengths, codebook.digits), digits)
    return digits


@compiled
def _symbol_at(row, place, symbol):
    """The digits from `place` on as one symbol; zeros follow a row."""
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
    for i in range((digits.shape[1] + symbol.ndim - 1) // symbol.ndim):
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


@parallel
def _decode_rows(codes, offsets, words, digits):
    lengths, word_digits = words
    width = digits.shape[1]
    for row in numba.prange(len(digits)):
        at = 0
        for i in range(offsets[row], offsets[row + 1]):
            code = _index(codes[i])
            length = lengths[code]
            for j in range(min(length, width - at)):
                digits[row, at + j] = word_digits[code, _index(j)]
            at += length
