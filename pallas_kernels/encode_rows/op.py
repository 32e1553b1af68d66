"""The public op `encode_rows`: checks, then the implementation for the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from pallas_kernels.backend import Implementation, Op, get_implementation
from pallas_kernels.encode_rows import reference
from pallas_kernels.encode_rows.operands import EncodedRows, EncodeTable
from pallas_kernels.operands import AnyArray


def _cpu() -> Implementation:
    from pallas_kernels.encode_rows import cpu

    return cpu.encode_rows


def _pallas() -> Implementation:
    from pallas_kernels.encode_rows import pallas

    return pallas.encode_rows


OP = Op("encode_rows", {"reference": lambda: reference.encode_rows, "cpu": _cpu, "pallas": _pallas})


@functools.partial(jax.jit, static_argnames="backend")
def encode_rows(
    digits: UInt8[AnyArray, "*expert row width"],
    table: EncodeTable,
    *,
    backend: str | Implementation | None = None,
) -> EncodedRows:
    """Encode each row by itself, greedily by the longest codeword that matches.

    Only the last codeword of a row may run past its end. A digit above 2 counts as 2: no input reads or
    writes out of bounds. The result has room for a code per symbol, as the worst digits take.

    Args:
        digits: 0 for zero, 1 for the row's minimum, 2 for its maximum.
        table: the codebook.
        backend: "cpu", "pallas", "pallas_interpret", "reference", or a function to use as the implementation;
            by default the first of the platform's backends that can run.

    Raises:
        ValueError: rows or columns are missing, the dtype is another one, or an expert may take more
            codewords than an int32 counts.
        NotImplementedError: `backend` cannot run here.
    """
    *experts, rows, width = digits.shape
    if digits.dtype != jnp.uint8 or rows == 0 or width == 0:
        raise ValueError(
            f"encode_rows: expected uint8 digits [..., row, width], found {digits.dtype} {digits.shape}"
        )
    most = rows * table.symbols(width)
    if most > np.iinfo(np.int32).max:
        raise ValueError(
            f"encode_rows: {rows} rows of {width} digits may take {most} codewords: more than an int32 counts"
        )
    run = get_implementation(OP, backend)
    # Shape: [expert, row, width]
    codes, row_offsets = run(jnp.asarray(digits).reshape(-1, rows, width), table)
    return EncodedRows(codes.reshape(*experts, -1), row_offsets.reshape(*experts, rows + 1))
