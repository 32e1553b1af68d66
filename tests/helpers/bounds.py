"""Checks every load and store of a Pallas kernel against its array, in interpret mode.

Interpret mode clamps an index out of range, so finite outputs alone would not show one: within
`checked_kernels`, `plt.load` and `plt.store` count the elements that lie outside.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

traced: set[str] = set()
strays: list[tuple[str, int]] = []


def outside(at, mask) -> jax.Array:
    """Count the elements that `ref.at[...]` names under the mask and that do not exist."""
    indexer = at.transforms[-1]
    slices = [index for index in indexer.indices if isinstance(index, pl.Slice)]
    inside = jnp.bool_(True)
    for index, size in zip(indexer.indices, indexer.shape, strict=True):
        if isinstance(index, pl.Slice):
            axes = [-1 if other is index else 1 for other in slices]
            places = (index.start + jnp.arange(index.size) * index.stride).reshape(axes)
        else:
            places = index
        inside &= (places >= 0) & (places < size)
    return jnp.sum(~inside if mask is None else mask & ~inside)


def checked(name, function):
    def run(at, *values, mask=None, **options):
        traced.add(name)
        count = outside(at, mask)
        report = lambda: jax.debug.callback(lambda count: strays.append((name, int(count))), count)
        jax.lax.cond(count > 0, report, lambda: None)
        return function(at, *values, mask=mask, **options)

    return run


@contextlib.contextmanager
def checked_kernels() -> Iterator[None]:
    """Kernels traced inside report to `traced` and `strays`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "store"):
            patch.setattr(plt, name, checked(name, getattr(plt, name)))
        yield


def ran(run, *operands) -> list[np.ndarray]:
    """Run and return the outputs; `strays` then holds what was found outside."""
    strays.clear()
    outputs = jax.block_until_ready(run(*operands))
    jax.effects_barrier()
    return [np.asarray(output) for output in jax.tree.leaves(outputs)]
