"""Unpacking on a CPU by numba: a thread clears its rows and writes their nonzeros."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.cpu.ffi import HostFunction
from pallas_kernels.cpu.packed_arguments import packed_arrays, packed_from, packed_integers
from pallas_kernels.cpu.unpack_rows import unpack_rows
from pallas_kernels.operands import PackedMatrix


def unpack(packed: PackedMatrix, dtype: np.dtype) -> Float[Array, "expert out in"]:
    """Decode as `pallas_kernels.unpack` does."""
    result = jax.ShapeDtypeStruct((packed.num_experts, packed.rows, packed.width), jnp.float32)
    return _unpack_on_host(result, *packed_arrays(packed), **packed_integers(packed, "packed")).astype(dtype)


@HostFunction
def _unpack_on_host(*operands: np.ndarray, **integers: Any) -> None:
    *arrays, y = operands
    unpack_rows(packed_from(arrays, integers, "packed"), y)
