"""Encoding and decoding without numba: all rows take a step at once, under jit. The same bytes as `walk.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt, UInt8

from qmoe_jax.coding.codebook import Codebook

_DECODED_AT_ONCE = 1 << 22  # digits: the index arrays take some 30 bytes each


def encode(digits: UInt8[np.ndarray, "row width"], codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """(codes, number of codewords of each row)."""
    step, trie, dtype = codebook.symbol_digits, codebook.trie, codebook.code_dtype
    padded = np.pad(digits, ((0, 0), (0, -digits.shape[1] % step)))  # a row goes on with zeros
    # Shape: [row, symbol, digit of the symbol]
    grouped = padded.reshape(len(digits), -1, step)
    symbols = (grouped * 3 ** np.arange(step, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    code, last_code = trie.code.astype(dtype), trie.last_code.astype(dtype)
    codes, ends = map(np.asarray, _walk(symbols.T, trie.follow, code, last_code))
    return codes.T[ends.T], ends.sum(0)


@jax.jit
def _walk(
    symbols: UInt8[Array, "symbol row"],
    follow: Int32[Array, "node fanout"],
    code: UInt[Array, "node"],
    last_code: UInt[Array, "node"],
) -> tuple[UInt[Array, "step row"], Bool[Array, "step row"]]:
    """For each step and row, the code of the node before it, and whether that codeword ends there."""

    def step(node: Array, symbol: Array) -> tuple[Array, tuple[Array, Array]]:
        reached = follow[node, symbol]
        return jnp.where(reached < 0, ~reached, reached), (code[node], reached < 0)

    start = jnp.zeros(symbols.shape[1], jnp.int32)
    node, (codes, ends) = jax.lax.scan(step, start, symbols)
    last = last_code[node][None]
    return jnp.concatenate([codes, last]), jnp.concatenate([ends, jnp.ones(last.shape, bool)])


def decode(
    codes: np.ndarray, row_offsets: Int32[np.ndarray, "bound"], codebook: Codebook, width: int
) -> UInt8[np.ndarray, "row width"]:
    """The digits of rows whose codewords are known to cover them."""
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
    """A digit for each codeword and place in it, kept where it lies within its row."""
    lengths = codebook.lengths[codes]
    ends = np.cumsum(lengths)
    row_of = np.repeat(np.arange(len(digits)), np.diff(bounds))
    row_start = (ends - lengths)[bounds[:-1]]
    codeword = np.repeat(np.arange(len(codes)), lengths)
    place = np.arange(len(codeword)) - (ends - lengths)[codeword]
    column = np.arange(len(codeword)) - row_start[row_of[codeword]]
    within = column < digits.shape[1]
    digits.reshape(-1)[...] = codebook.digits[codes[codeword[within]], place[within]]
