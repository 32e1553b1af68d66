"""Pallas on a GPU: a thread walks the trie along a row, once to count its codewords and once to write them.

Walking twice is cheaper than it looks: the second walk writes each code to its final place, where a single
one would write and read back a code for every symbol. The trie of a small codebook stays in the first-level
cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, UInt8

from pallas_kernels.backend import triton_parameters
from pallas_kernels.encode_rows.operands import EncodedRows, EncodeTable
from pallas_kernels.encode_rows.symbols import offsets_of, symbols_of

WARPS = 1  # a row waits for its own loads alone: small programs spread over all processors
ROWS = 32 * WARPS  # per program: one per thread


def encode_rows(
    digits: UInt8[Array, "expert row width"],
    table: EncodeTable,
    *,
    interpret: bool = False,
) -> EncodedRows:
    """See `pallas_kernels.encode_rows`.

    Raises:
        NotImplementedError: digits or codes of 2 to 4 GiB, whose offsets Pallas computes in 32 bits that
            Triton reads as signed.
    """
    experts, rows, _ = digits.shape
    symbols = symbols_of(digits, table)
    capacity = rows * symbols.shape[1]
    code, last_code = jnp.asarray(table.code), jnp.asarray(table.last_code)
    for name, size in (("digits", symbols.size), ("codes", experts * capacity * code.dtype.itemsize)):
        if 2**31 < size <= 2**32:
            raise NotImplementedError(
                f"Pallas' Triton backend cannot address {name} of {size:,} bytes (2 to 4 GiB): encode "
                f"fewer experts at a time"
            )
    call = functools.partial(
        pl.pallas_call,
        grid=(pl.cdiv(rows, ROWS), experts),
        compiler_params=triton_parameters(num_warps=WARPS),
        interpret=interpret,
    )
    operands = symbols, jnp.asarray(table.follow).reshape(-1)
    counts = call(
        functools.partial(_count_kernel, fanout=table.fanout),
        out_shape=jax.ShapeDtypeStruct((experts, rows), jnp.int32),
        name="encode_rows_count",
    )(*operands)
    row_offsets = offsets_of(counts)
    codes = call(
        functools.partial(_write_kernel, fanout=table.fanout),
        out_shape=jax.ShapeDtypeStruct((experts, capacity + 1), code.dtype),
        name="encode_rows_write",
    )(*operands, code, last_code, row_offsets)
    written = jnp.arange(capacity)[None] < row_offsets[:, -1:]
    return EncodedRows(jnp.where(written, codes[:, :-1], 0), row_offsets)


def _count_kernel(symbols: Any, follow: Any, counts: Any, *, fanout: int) -> None:
    expert, rows, live = _rows(symbols)
    start = jnp.zeros(ROWS, jnp.int32)
    _, count = _walk(symbols, follow, start, lambda node, count, ended: None, fanout=fanout)
    plt.store(counts.at[expert, rows], count + 1, mask=live)


def _write_kernel(
    symbols: Any, follow: Any, code: Any, last_code: Any, row_offsets: Any, codes: Any, *, fanout: int
) -> None:
    """Write the codes; the last place of `codes` is for rows that do not exist."""
    expert, rows, live = _rows(symbols)
    nowhere = codes.shape[1] - 1

    def write(words: Any, node: Array, place: Array, ended: Array) -> None:
        code = plt.load(words.at[node], mask=ended, other=0)
        plt.store(codes.at[expert, place], code, mask=ended)

    start = plt.load(row_offsets.at[expert, rows], mask=live, other=nowhere)
    node, place = _walk(symbols, follow, start, functools.partial(write, code), fanout=fanout)
    write(last_code, node, place, live)


def _rows(symbols: Any) -> tuple[Any, Array, Array]:
    """Return (expert, rows of this program, true for the rows that exist)."""
    rows = pl.program_id(0) * ROWS + jnp.arange(ROWS)
    return pl.program_id(1), rows, rows < symbols.shape[2]


def _walk(symbols: Any, follow: Any, place: Array, visit: Any, *, fanout: int) -> tuple[Array, Array]:
    """Return the last node of each row and the place of its codeword, counted on from `place`.

    `visit(node, place, ended)` is called at every step.
    """
    expert, rows, live = _rows(symbols)

    def step(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        node, place = state
        symbol = plt.load(symbols.at[expert, i, rows], mask=live, other=0).astype(jnp.int32)
        reached = plt.load(follow.at[node * fanout + symbol], mask=live, other=0)
        ended = live & (reached < 0)
        visit(node, place, ended)
        return jnp.where(ended, ~reached, reached), place + ended.astype(jnp.int32)

    return jax.lax.fori_loop(0, symbols.shape[1], step, (jnp.zeros(ROWS, jnp.int32), place))
