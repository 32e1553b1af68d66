"""A checkpoint's tensors as the model's parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import traverse_util
from jax import numpy as jnp
from jax.typing import DTypeLike

from qmoe_jax.checkpoints.reader import Reader


def parameter_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """A parameter's dtype where a model computes in `dtype`: the router stays float32, as it was trained."""
    return jnp.dtype(jnp.float32 if "/router/" in name else dtype)


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays under T5X's paths as nested dicts."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def read_params(
    reader: Reader,
    names: Iterable[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Read parameters (all by default) as nested dicts of device arrays, cast by `parameter_dtype`.

    Memory: the result and one tensor more. `done` is called with each name once it is read.
    """
    arrays = {}
    for name in reader.names() if names is None else names:
        arrays[name] = jax.device_put(reader.read(name).astype(parameter_dtype(name, dtype)))
        done(name)
    return nest(arrays)
