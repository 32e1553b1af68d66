"""A checkpoint's tensors as the model's parameter tree, on the default device or where a sharding says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.parameters import EMBEDDING
from qmoe_jax.progress import ProgressCallback, no_progress

ALIGNMENT = 64
"""Bytes that memory must be aligned to for XLA to use it in place on a CPU."""


def parameter_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """Return a parameter's dtype in a model that computes in `dtype`; routers stay float32, as trained."""
    return jnp.dtype(jnp.float32 if "/router/" in name else dtype)


def narrow_dtype(name: str, dtype: DTypeLike, stored: DTypeLike, *, tied: bool) -> jnp.dtype:
    """Return the dtype a CPU keeps a parameter in: bfloat16 if it is stored so and only read to be widened.

    That is half the memory, and half the time where a few tokens are multiplied by a large matrix. The
    embedding of a tied model is also the transposed operand of a product, which needs float32.
    """
    wanted = parameter_dtype(name, dtype)
    widened = name.endswith("/kernel") or (name == EMBEDDING and not tied)
    stays = wanted == jnp.float32 and jnp.dtype(stored) == jnp.bfloat16 and widened and "/router/" not in name
    return jnp.dtype(jnp.bfloat16) if stays else wanted


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays under T5X's paths as nested dicts."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def to_device(
    array: np.ndarray, dtype: DTypeLike, sharding: jax.sharding.Sharding | None = None
) -> jax.Array:
    """Return an array on the default device, or as `sharding` says, cast to `dtype`.

    A CPU uses arrays in place if they begin at a multiple of 64 bytes, so a copy that does is made. NumPy
    asks for large pages for it, on which a matrix that is read whole in every step is faster.
    """
    dtype = jnp.dtype(dtype)
    buffer = np.empty(array.size * dtype.itemsize + ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % ALIGNMENT
    aligned = buffer[begin : begin + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    np.copyto(aligned, array, casting="unsafe")
    return jax.device_put(aligned, sharding)


def read_params(
    checkpoint: Checkpoint,
    names: Iterable[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    narrow: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Read parameters as nested dicts of device arrays. Memory: the result, and a tensor twice at a time.

    Args:
        checkpoint: what to read.
        names: the parameters; None: all.
        dtype: what the model computes in; parameters are cast by `parameter_dtype`.
        narrow: cast by `narrow_dtype` instead.
        sharding: of every parameter; None: on the default device.
        progress: counts parameters; its label is the name of the next one.

    Raises:
        CheckpointError: a parameter cannot be read, or holds a number that is not finite.
    """
    chosen, arrays = list(checkpoint.names() if names is None else names), {}
    for done, name in enumerate(chosen):
        progress(done, len(chosen), name)
        kept = parameter_dtype(name, dtype)
        if narrow:
            kept = narrow_dtype(name, dtype, checkpoint.dtype(name), tied=checkpoint.config.tied)
        arrays[name] = to_device(checkpoint.read_finite(name, dtype=kept), kept, sharding)
    progress(len(chosen), len(chosen), "")
    return nest(arrays)
