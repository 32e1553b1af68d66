"""numba on a CPU: `walk` for each expert."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.encode_rows.operands import EncodedRows, EncodeTable
from pallas_kernels.encode_rows.walk import walk


def encode_rows(digits: UInt8[Array, "expert row width"], table: EncodeTable, capacity: int) -> EncodedRows:
    """See `encode_rows`."""
    experts, rows, _ = digits.shape
    _compile(np.dtype(table.code.dtype), table.symbol_digits)
    results = (
        jax.ShapeDtypeStruct((experts, capacity), table.code.dtype),
        jax.ShapeDtypeStruct((experts, rows + 1), jnp.int32),
    )
    arrays = table.follow, table.code, table.last_code
    return EncodedRows(*_encode_on_host(results, digits, *arrays, symbol_digits=table.symbol_digits))


@HostFunction
def _encode_on_host(
    digits: np.ndarray,
    follow: np.ndarray,
    code: np.ndarray,
    last_code: np.ndarray,
    codes: np.ndarray,
    row_offsets: np.ndarray,
    *,
    symbol_digits: int,
) -> None:
    table = EncodeTable(follow, code, last_code, symbol_digits)
    for expert, matrix in enumerate(digits):
        known = matrix if matrix.max() <= 2 else np.minimum(matrix, 2)
        found, row_offsets[expert] = walk(known, table, codes.shape[1])
        codes[expert, : len(found)] = found
        codes[expert, len(found) :] = 0


@functools.lru_cache
def _compile(code: np.dtype, symbol_digits: int) -> None:
    """Compiles `walk` while tracing, so that no step waits for it; numba caches it on disk for later runs."""
    follow, codes = np.zeros((1, 3**symbol_digits), np.int32), np.zeros(1, code)
    walk(np.zeros((1, 1), np.uint8), EncodeTable(follow, codes, codes, symbol_digits))
