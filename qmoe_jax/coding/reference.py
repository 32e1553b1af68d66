"""Decoding in plain NumPy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt8

from qmoe_jax.coding.codebook import Codebook

_DECODED_AT_ONCE = 1 << 22  # digits: the index arrays take some 30 bytes each


def decode(
    codes: np.ndarray, row_offsets: Int32[np.ndarray, "bound"], codebook: Codebook, width: int
) -> UInt8[np.ndarray, "row width"]:
    """Return the digits of rows whose codewords are known to cover them."""
    digits = np.empty((len(row_offsets) - 1, width), np.uint8)
    some = max(1, _DECODED_AT_ONCE // width)
    for first in range(0, len(digits), some):
        bounds = row_offsets[first : first + some + 1]
        _decode_into(
            digits[first : first + some], codes[bounds[0] : bounds[-1]], bounds - bounds[0], codebook
        )
    return digits


def _decode_into(
    digits: UInt8[np.ndarray, "row width"],
    codes: np.ndarray,
    bounds: Int32[np.ndarray, "bound"],
    codebook: Codebook,
) -> None:
    """Write a digit for each codeword and place in it, where it lies within its row."""
    lengths = codebook.lengths[codes]
    ends = np.cumsum(lengths)
    row_of = np.repeat(np.arange(len(digits)), np.diff(bounds))
    row_start = (ends - lengths)[bounds[:-1]]
    codeword = np.repeat(np.arange(len(codes)), lengths)
    place = np.arange(len(codeword)) - (ends - lengths)[codeword]
    column = np.arange(len(codeword)) - row_start[row_of[codeword]]
    within = column < digits.shape[1]
    digits.reshape(-1)[...] = codebook.digits[codes[codeword[within]], place[within]]
