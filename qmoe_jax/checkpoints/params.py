"""A checkpoint's tensors as the model's parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import numpy as jnp
from jax.typing import DTypeLike

from qmoe_jax.checkpoints.reader import Reader

ALIGNMENT = 64
"""Bytes: what XLA wants of memory that it is to use in place."""


def parameter_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """A parameter's dtype where a model computes in `dtype`: the router stays float32, as it was trained."""
    return jnp.dtype(jnp.float32 if "/router/" in name else dtype)


def narrow_dtype(name: str, dtype: DTypeLike, stored: DTypeLike, *, tied: bool) -> jnp.dtype:
    """The dtype that a CPU keeps a parameter in: bfloat16 where it is stored so and is only read to be widened.

    That is half the memory, and half the time where a few tokens meet a large matrix. The embedding of a tied model
    is multiplied by, transposed, which wants float32.
    """
    wanted = parameter_dtype(name, dtype)
    widened = name.endswith("/kernel") or (name == "token_embedder/embedding" and not tied)
    stays = wanted == jnp.float32 and jnp.dtype(stored) == jnp.bfloat16 and widened and "/router/" not in name
    return jnp.dtype(jnp.bfloat16) if stays else wanted


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays under T5X's paths as nested dicts."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def to_device(array: np.ndarray, dtype: DTypeLike) -> jax.Array:
    """An array on the default device in some dtype.

    A CPU's arrays are used where they lie if they begin at a multiple of 64 bytes, so they are made to; NumPy asks for
    large pages for them, which a matrix that is read whole in every step is faster on.
    """
    dtype = jnp.dtype(dtype)
    buffer = np.empty(array.size * dtype.itemsize + ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % ALIGNMENT
    aligned = buffer[begin : begin + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    np.copyto(aligned, array, casting="unsafe")
    return jax.device_put(aligned)


def read_params(
    reader: Reader,
    names: Iterable[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    narrow: bool = False,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Read parameters (all by default) as nested dicts of device arrays, cast by `parameter_dtype`.

    With `narrow`, by `narrow_dtype`. Memory: the result and one tensor more. `done` is called with each name once it
    is read.
    """
    arrays = {}
    for name in reader.names() if names is None else names:
        kept = parameter_dtype(name, dtype)
        if narrow:
            kept = narrow_dtype(name, dtype, reader.dtype(name), tied=reader.config.tied)
        arrays[name] = to_device(reader.read(name), kept)
        done(name)
    return nest(arrays)
