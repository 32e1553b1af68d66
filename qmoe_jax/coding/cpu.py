"""Decoding compiled by numba; rows in parallel."""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Int32, UInt8

from pallas_kernels.cpu.compiled import parallel
from qmoe_jax.coding.codebook import Codebook

_index = np.uintp  # unsigned: numba checks signed indices for counting from the end


def decode(
    codes: np.ndarray, row_offsets: Int32[np.ndarray, "bound"], codebook: Codebook, width: int
) -> UInt8[np.ndarray, "row width"]:
    """Return the digits of rows whose codewords are known to cover them."""
    digits = np.empty((len(row_offsets) - 1, width), np.uint8)
    _decode_rows(codes, row_offsets, (codebook.lengths, codebook.digits), digits)
    return digits


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
