"""The inner loops of encoding and decoding, compiled by numba; rows in parallel."""

from __future__ import annotations

import numba
import numpy as np

from pallas_kernels.host.compiled import parallel

# What `decode_rows` reports of a row: fine, a code beyond the codebook, too few digits, a codeword past the end.
FINE, UNKNOWN_CODE, TOO_SHORT, TOO_LONG = 0, 1, 2, 3


@parallel
def encode_rows(digits, child, code, last_code, symbol_digits, scratch, counts):
    """Greedy longest match of each row of `digits`; codes go to `scratch` [row, symbols], their number to `counts`."""
    rows, width = digits.shape
    symbols = (width + symbol_digits - 1) // symbol_digits
    fanout = child.shape[1]
    edges = child.reshape(-1)
    for row in numba.prange(rows):
        node, count = 0, 0
        for i in range(symbols):
            symbol, place = 0, 1
            for j in range(symbol_digits):
                column = i * symbol_digits + j
                if column < width:  # an odd width is coded as if a zero followed
                    symbol += place * digits[row, column]
                place *= 3
            follower = edges[node * fanout + symbol]
            if follower < 0:
                scratch[row, count] = code[node]
                count += 1
                follower = edges[symbol]
            node = follower
        scratch[row, count] = last_code[node]
        counts[row] = count + 1


@parallel
def gather_rows(scratch, offsets, codes):
    """The rows of `scratch` one after another."""
    for row in numba.prange(len(offsets) - 1):
        start, stop = offsets[row], offsets[row + 1]
        for i in range(stop - start):
            codes[start + i] = scratch[row, i]


@parallel
def decode_rows(codes, offsets, lengths, words, digits, status, position):
    """Fill the rows of `digits`; a row that cannot be is told in `status` and the `position` of its codeword.

    Only the last codeword of a row may run past it.
    """
    width = digits.shape[1]
    for row in numba.prange(len(offsets) - 1):
        at, i, found = np.int64(0), offsets[row], FINE
        while i < offsets[row + 1] and found == FINE:
            value = codes[i]
            if value >= len(lengths):
                found = UNKNOWN_CODE
            elif at >= width:
                found = TOO_LONG
            else:
                length = min(np.int64(lengths[value]), width - at)
                for j in range(length):
                    digits[row, at + j] = words[value, j]
                at += np.int64(lengths[value])
                i += 1
        if found == FINE and at < width:
            found = TOO_SHORT
        status[row] = found
        position[row] = i - offsets[row]
