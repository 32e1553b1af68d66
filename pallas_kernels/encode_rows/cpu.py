"""numba on a CPU: the walk of `walk.py` for each expert."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.encode_rows.operands import EncodedRows, EncodeTable
from pallas_kernels.encode_rows.walk import encode_matrix


def encode_rows(digits: UInt8[Array, "expert row width"], table: EncodeTable) -> EncodedRows:
    """See `pallas_kernels.encode_rows`."""
    experts, rows, width = digits.shape
    _compile(np.dtype(table.code.dtype), table.symbol_digits)
    results = (
        jax.ShapeDtypeStruct((experts, rows * table.symbols(width)), table.code.dtype),
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
    for matrix, matrix_codes, offsets in zip(digits, codes, row_offsets, strict=True):
        encode_matrix(matrix if matrix.max() <= 2 else np.minimum(matrix, 2), table, matrix_codes, offsets)


@functools.lru_cache
def _compile(code: np.dtype, symbol_digits: int) -> None:
    """Compile the walk while tracing, so that no step waits for it; numba caches it on disk."""
    follow, codes = np.zeros((1, 3**symbol_digits), np.int32), np.zeros(1, code)
    table = EncodeTable(follow, codes, codes, symbol_digits)
    encode_matrix(np.zeros((1, 1), np.uint8), table, np.zeros(1, code), np.zeros(2, np.int32))
