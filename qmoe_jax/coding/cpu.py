"""Decoding compiled by numba; rows in parallel."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt8

from pallas_kernels.cpu.compiled import as_index, compiled
from pallas_kernels.cpu.threads import next_chunk, parallel_for
from qmoe_jax.coding.codebook import Codebook

_CHUNK_ROWS = 16


def decode(
    codes: np.ndarray, row_offsets: Int32[np.ndarray, "bound"], codebook: Codebook, width: int
) -> UInt8[np.ndarray, "row width"]:
    """Return the digits of rows whose codewords are known to cover them."""
    digits = np.empty((len(row_offsets) - 1, width), np.uint8)
    parallel_for(_decode_rows, codes, row_offsets, (codebook.lengths, codebook.digits), digits)
    return digits


@compiled
def _decode_rows(counter, codes, offsets, words, digits):
    chunk = next_chunk(counter)
    while chunk * _CHUNK_ROWS < len(digits):
        for row in range(chunk * _CHUNK_ROWS, min((chunk + 1) * _CHUNK_ROWS, len(digits))):
            _decode_row(codes, offsets[row : row + 2], words, digits[row])
        chunk = next_chunk(counter)


@compiled
def _decode_row(codes, span, words, digits):
    lengths, word_digits = words
    at, width = 0, len(digits)
    for i in range(span[0], span[1]):
        code = as_index(codes[i])
        length = lengths[code]
        for j in range(min(length, width - at)):
            digits[at + j] = word_digits[code, as_index(j)]
        at += length
