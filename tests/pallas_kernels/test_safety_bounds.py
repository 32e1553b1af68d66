"""Every load and store of the Pallas kernels is checked against its array: random codes, offsets, tables, experts.

Interpret mode clamps an index out of range, so finite outputs alone would not show one: here `plt.load` and
`plt.store` say how many elements lie outside.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

import pallas_kernels as pk
from pallas_kernels.matmul.pallas import packed_matmul as matmul
from pallas_kernels.matvec.pallas import matvec
from pallas_kernels.mlp.pallas import packed_mlp as mlp
from pallas_kernels.unpack.pallas import unpack as decode
from tests.helpers import packed_samples as samples

EXPERTS, D_MODEL, D_FF, TOKENS = 2, 11, 21, 3
BOOK = samples.CODEBOOKS["tunstall-12-dense"]()  # two words an entry

traced: set[str] = set()
strays: list[tuple[str, int]] = []


def outside(at, mask) -> jax.Array:
    """How many of the elements that `ref.at[...]` names, under the mask, do not exist."""
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


@pytest.fixture(scope="module", autouse=True)
def checking():
    """Kernels traced in this module report."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "store"):
            patch.setattr(plt, name, checked(name, getattr(plt, name)))
        yield


def ran(run, *operands) -> list[np.ndarray]:
    """The outputs; what was found outside is in `strays`."""
    strays.clear()
    outputs = jax.block_until_ready(run(*operands))
    jax.effects_barrier()
    return [np.asarray(output) for output in jax.tree.leaves(outputs)]


@jax.jit
def everything(wi, wo, x, expert_index):
    """All kernels of the ops."""
    scale = jnp.ones(x.shape[0])
    return (
        matvec(wi, x, expert_index, interpret=True),
        matmul(wi, x, expert_index, interpret=True),
        mlp((wi,), wo, x, expert_index, scale, activation="relu", interpret=True),
        decode(wi, jnp.dtype("float32"), interpret=True),
    )


def random_matrix(rows: int, width: int, rng: np.random.Generator) -> pk.PackedMatrix:
    """Whatever the dtypes can hold, but for the levels: half of the offsets near the codes, half anywhere."""
    packed = samples.sample(BOOK, (EXPERTS, rows, width)).packed
    capacity, anything = rows * width, np.iinfo(np.int32)
    near = rng.integers(-capacity, 2 * capacity, packed.row_offsets.shape)
    far = rng.integers(anything.min, anything.max, near.shape, endpoint=True)
    return dataclasses.replace(
        packed,
        codes=rng.integers(0, 2**16, (EXPERTS, capacity), np.uint16),
        row_offsets=np.where(rng.random(near.shape) < 0.5, near, far).astype(np.int32),
        table=dataclasses.replace(
            packed.table, entries=rng.integers(0, 2**32, packed.table.entries.shape, np.uint32)
        ),
    )


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_kernel_leaves_its_arrays(seed):
    rng = np.random.default_rng(seed)
    wi, wo = random_matrix(D_FF, D_MODEL, rng), random_matrix(D_MODEL, D_FF, rng)
    x = jnp.asarray(rng.standard_normal((TOKENS, D_MODEL)), jnp.float32)
    expert_index = jnp.asarray(rng.integers(-(2**31), 2**31, TOKENS), jnp.int32)
    outputs = ran(everything, wi, wo, x, expert_index)
    assert traced == {"load", "store"}
    assert strays == []
    assert all(np.isfinite(output).all() for output in outputs)


@pytest.mark.parametrize("unmasked", ["load", "store"])
def test_an_index_outside_would_be_seen(unmasked):
    def kernel(x, y):
        at = jnp.arange(8)
        mask = at < 5
        value = plt.load(x.at[at], mask=None if unmasked == "load" else mask, other=0)
        plt.store(y.at[at], value, mask=None if unmasked == "store" else mask)

    run = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((5,), jnp.float32), interpret=True)
    ran(run, jnp.ones(5))
    assert strays == [(unmasked, 3)]
