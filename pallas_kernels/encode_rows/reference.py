"""Plain jax.numpy: all rows take a step at once, and each codeword that ends is scattered to its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from pallas_kernels.encode_rows.operands import EncodedRows, EncodeTable
from pallas_kernels.encode_rows.symbols import offsets_of, symbols_of


def encode_rows(digits: UInt8[Array, "expert row width"], table: EncodeTable) -> EncodedRows:
    """See `pallas_kernels.encode_rows`."""
    follow, code, last_code = map(jnp.asarray, (table.follow, table.code, table.last_code))

    def step(node: Array, symbol: Array) -> tuple[Array, tuple[Array, Array]]:
        reached = follow[node, symbol]
        return jnp.where(reached < 0, ~reached, reached), (code[node], reached < 0)

    symbols = symbols_of(digits, table).swapaxes(0, 1)
    # Shape: [symbol, expert, row]: the code of the node before each symbol, whether that codeword ends there
    node, (codes, ends) = jax.lax.scan(step, jnp.zeros(symbols.shape[1:], jnp.int32), symbols)
    codes = jnp.concatenate([codes, last_code[node][None]])
    ends = jnp.concatenate([ends, jnp.ones((1, *node.shape), bool)])
    rank = jnp.cumsum(ends, axis=0, dtype=jnp.int32)  # of a codeword in its row, from 1
    row_offsets = offsets_of(rank[-1])
    capacity = symbols.shape[0] * digits.shape[1]
    place = jnp.where(ends, row_offsets[None, :, :-1] + rank - 1, capacity)
    empty = jnp.zeros((digits.shape[0], capacity), code.dtype)
    put = jax.vmap(lambda row, place, codes: row.at[place].set(codes, mode="drop"), in_axes=(0, 1, 1))
    return EncodedRows(put(empty, place, codes), row_offsets)
