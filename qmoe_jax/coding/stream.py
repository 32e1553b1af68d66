"""Encode rows of ternary digits as streams of codewords, and decode them; corrupt streams are refused."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from pallas_kernels import PackedMatrix
from pallas_kernels.encode_rows import EncodedRows, encode_rows
from pallas_kernels.operands import AnyArray
from qmoe_jax.coding.codebook import Codebook


class CorruptStream(ValueError):
    """A stream that no matrix was encoded to; the message names the row and the codeword in it."""


def encode(
    digits: UInt8[AnyArray, "row width"], codebook: Codebook, *, backend: str | None = None
) -> EncodedRows:
    """Encode each row by itself, greedily by the longest codeword that matches.

    Args:
        digits: 0, 1 or 2 each; at least one row and column. Digits on a GPU are encoded there.
        codebook: the code.
        backend: of `pallas_kernels.encode_rows`; by default the first that can run on the platform. Each
            gives the same bytes.

    Returns:
        The codewords and row offsets, in host memory, without room behind them.

    Raises:
        ValueError: a digit is not 0, 1 or 2, there is none, or there may be more codewords than an int32
            counts.
        NotImplementedError: `backend` cannot run here.
    """
    if digits.ndim != 2 or 0 in digits.shape:
        raise ValueError(f"expected at least one row and column of digits, found {digits.shape}")
    if digits.max() > 2:
        row, column = np.argwhere(np.asarray(digits) > 2)[0]
        raise ValueError(
            f"row {row}, column {column}: expected a digit 0, 1 or 2, found {digits[row, column]}"
        )
    codes, row_offsets = map(np.asarray, encode_rows(digits, codebook.encode_table, backend=backend))
    return EncodedRows(codes[: row_offsets[-1]].copy(), row_offsets)


def decode(
    encoded: EncodedRows,
    codebook: Codebook,
    width: int,
    *,
    backend: Literal["cpu", "reference"] | None = None,
) -> UInt8[np.ndarray, "row width"]:
    """Return the digits of every row.

    Args:
        encoded: a matrix; it is checked, wherever it comes from.
        codebook: the code that it was encoded with.
        width: digits of a row.
        backend: "cpu" (compiled by numba; the default where that is there) or "reference".

    Raises:
        CorruptStream: the offsets do not fit the codes, a code is not in the codebook, or the codewords of a
            row do not cover its `width` digits exactly, but for the last one, which may run past.
    """
    codes, row_offsets = np.ascontiguousarray(encoded.codes), np.asarray(encoded.row_offsets)
    _check_offsets(row_offsets, codes)
    row_offsets = row_offsets.astype(np.int32)
    _check_codes(codes, row_offsets, codebook)
    _check_coverage(codes, row_offsets, codebook, width)
    if backend is None:
        backend = "cpu" if importlib.util.find_spec("numba") else "reference"
    implementation = importlib.import_module(f"qmoe_jax.coding.{backend}")
    return implementation.decode(codes, row_offsets, codebook, width)


def pack(
    streams: Sequence[EncodedRows], levels: Float[np.ndarray, "expert row 2"], codebook: Codebook, width: int
) -> PackedMatrix:
    """Return the matrices of several experts side by side, as the kernels take them, in host memory.

    Raises:
        CorruptStream: codes of another type than the codebook's.
    """
    if odd := [stream.codes.dtype for stream in streams if stream.codes.dtype != codebook.code_dtype]:
        raise CorruptStream(f"expected codes of {codebook.code_dtype}, found {odd[0]}")
    capacity = max(len(stream.codes) for stream in streams)
    capacity += capacity % 2  # a GPU reads more than 2 GiB of byte codes in pairs
    codes = np.zeros((len(streams), capacity), codebook.code_dtype)
    for row, stream in zip(codes, streams, strict=True):
        row[: len(stream.codes)] = stream.codes
    offsets = np.stack([stream.row_offsets for stream in streams])
    return PackedMatrix(codes, offsets, np.asarray(levels), codebook.decode_table, width)


def _check_offsets(offsets: Int[np.ndarray, "bound"], codes: np.ndarray) -> None:
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(codes):
        ends = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "none"
        raise CorruptStream(f"row offsets: expected from 0 to the {len(codes)} codewords, found {ends}")
    if (bad := np.flatnonzero(np.diff(offsets.astype(np.int64)) < 1)).size:
        row = int(bad[0])
        raise CorruptStream(f"row {row}: begins at codeword {offsets[row]} and ends at {offsets[row + 1]}")


def _check_codes(codes: np.ndarray, offsets: Int32[np.ndarray, "bound"], codebook: Codebook) -> None:
    if len(codes) and codes.max() >= codebook.size:
        first = int((codes >= codebook.size).argmax())
        where = _where(first, offsets)
        raise CorruptStream(f"{where}: expected a code below {codebook.size}, found {codes[first]}")


def _check_coverage(
    codes: np.ndarray, offsets: Int32[np.ndarray, "bound"], codebook: Codebook, width: int
) -> None:
    """Check that the last codeword of every row begins within the row and reaches its end."""
    if len(offsets) == 1:
        return
    lengths = codebook.lengths[codes]
    covered = np.add.reduceat(lengths, offsets[:-1], dtype=np.int64)
    if (bad := np.flatnonzero(covered < width)).size:
        row = int(bad[0])
        where = _where(int(offsets[row + 1]) - 1, offsets)
        raise CorruptStream(f"{where}: the row ends after {covered[row]} of {width} digits")
    if (bad := np.flatnonzero(covered - lengths[offsets[1:] - 1] >= width)).size:
        row = int(bad[0])
        reached = np.cumsum(lengths[offsets[row] : offsets[row + 1]])
        excess = int(offsets[row]) + int((reached >= width).argmax()) + 1
        raise CorruptStream(f"{_where(excess, offsets)}: the row already has its {width} digits")


def _where(codeword: int, offsets: Int32[np.ndarray, "bound"]) -> str:
    row = int(np.searchsorted(offsets, codeword, side="right")) - 1
    return f"row {row}, codeword {codeword - offsets[row]}"
