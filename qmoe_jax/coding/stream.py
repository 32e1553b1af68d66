"""Rows of ternary digits as streams of codewords, and back; a corrupt stream is refused with its row and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8, UInt16

from pallas_kernels import PackedMatrix
from qmoe_jax.coding import walk
from qmoe_jax.coding.codebook import Codebook


class CorruptStream(ValueError):
    """A stream that no matrix was encoded to; the message names row and position (in codewords of the row)."""


class Encoded(NamedTuple):
    """A matrix as codewords: row r is `codes[row_offsets[r] : row_offsets[r + 1]]`."""

    codes: UInt8[np.ndarray, "codeword"] | UInt16[np.ndarray, "codeword"]
    row_offsets: Int32[np.ndarray, "row+1"]


def encode(digits: UInt8[np.ndarray, "row width"], codebook: Codebook) -> Encoded:
    """Codes each row by itself, greedily by the longest codeword that matches.

    Takes one code a symbol of scratch memory, released on return.

    Raises:
      ValueError: a digit is not 0, 1 or 2, or there is none.
    """
    digits = np.ascontiguousarray(digits, np.uint8)
    rows, width = digits.shape
    if rows == 0 or width == 0:
        raise ValueError(f"expected at least one row and column of digits, found {digits.shape}")
    if digits.max() > 2:
        row, column = np.argwhere(digits > 2)[0]
        raise ValueError(
            f"row {row}, column {column}: expected a digit 0, 1 or 2, found {digits[row, column]}"
        )
    trie, step = codebook.trie, codebook.symbol_digits
    scratch = np.empty((rows, -(-width // step)), codebook.code_dtype)
    counts = np.empty(rows, np.int64)
    walk.encode_rows(digits, trie.child, trie.code, trie.last_code, step, scratch, counts)
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{rows} rows of {width} digits take {offsets[-1]} codewords: more than an int32 counts"
        )
    codes = np.empty(offsets[-1], codebook.code_dtype)
    row_offsets = offsets.astype(np.int32)
    walk.gather_rows(scratch, row_offsets, codes)
    return Encoded(codes, row_offsets)


def decode(encoded: Encoded, codebook: Codebook, width: int) -> UInt8[np.ndarray, "row width"]:
    """The digits of every row.

    Raises:
      CorruptStream: offsets are not those of the codes, a code is none of the codebook's, or a row's codewords do
        not cover exactly `width` digits (the last may run past it).
    """
    codes = np.ascontiguousarray(encoded.codes)
    offsets = _checked_offsets(np.asarray(encoded.row_offsets), len(codes))
    rows = len(offsets) - 1
    digits = np.empty((rows, width), np.uint8)
    status, position = np.empty(rows, np.int64), np.empty(rows, np.int64)
    walk.decode_rows(codes, offsets, codebook.lengths, codebook.digits, digits, status, position)
    if (bad := np.flatnonzero(status)).size:
        row = int(bad[0])
        raise CorruptStream(
            _explain(int(status[row]), row, int(position[row]), codes[offsets[row] :], codebook, width)
        )
    return digits


def pack(
    streams: Sequence[Encoded], levels: Float[np.ndarray, "expert row 2"], codebook: Codebook, width: int
) -> PackedMatrix:
    """The matrices of several experts side by side, as the kernels take them, in host memory."""
    capacity = max(len(stream.codes) for stream in streams)
    codes = np.zeros((len(streams), capacity), codebook.code_dtype)
    for row, stream in zip(codes, streams, strict=True):
        row[: len(stream.codes)] = stream.codes
    offsets = np.stack([stream.row_offsets for stream in streams])
    return PackedMatrix(codes, offsets, np.asarray(levels), codebook.decode_table, width)


def _checked_offsets(offsets: np.ndarray, codes: int) -> Int32[np.ndarray, "offset"]:
    if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != codes:
        ends = (int(offsets[0]), int(offsets[-1])) if offsets.ndim == 1 and len(offsets) else offsets.shape
        raise CorruptStream(f"row offsets: expected from 0 to the {codes} codewords, found {ends}")
    if (bad := np.flatnonzero(np.diff(offsets) < 0)).size:
        row = int(bad[0])
        raise CorruptStream(
            f"row {row}: ends at codeword {offsets[row + 1]}, before its beginning {offsets[row]}"
        )
    return offsets.astype(np.int32)


def _explain(status: int, row: int, position: int, codes: np.ndarray, codebook: Codebook, width: int) -> str:
    where = f"row {row}, codeword {position}"
    if status == walk.UNKNOWN_CODE:
        return f"{where}: expected a code below {codebook.size}, found {codes[position]}"
    if status == walk.TOO_SHORT:
        covered = int(codebook.lengths[codes[:position]].sum())
        return f"{where}: the row ends after {covered} of {width} digits"
    return f"{where}: the row already has its {width} digits"
