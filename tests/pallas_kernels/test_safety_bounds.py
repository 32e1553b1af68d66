"""Loads and stores of the Pallas kernels stay in their arrays: random codes, offsets, tables, experts."""

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
from pallas_kernels.mlp.pallas import packed_mlp
from pallas_kernels.unpack.pallas import unpack
from tests.helpers import packed_samples as samples
from tests.helpers.bounds import checked_kernels, ran, strays, traced
from tests.helpers.kernel_contract import PALLAS_ROUTES, pallas_route

EXPERTS, D_MODEL, D_FF, TOKENS = 2, 11, 21, 3
BOOK = samples.CODEBOOKS["tunstall-12-dense"]()  # two words per entry


@pytest.fixture(scope="module", autouse=True)
def checking():
    with checked_kernels():
        yield


@jax.jit
def everything(wi, wo, x, expert_index):
    """Run every kernel of the ops that read packed matrices."""
    scale = jnp.ones(x.shape[0])
    return (
        *(pallas_route(route, interpret=True)(wi, x, expert_index) for route in PALLAS_ROUTES),
        packed_mlp((wi,), wo, x, expert_index, scale, activation="relu", interpret=True),
        unpack(wi, jnp.dtype("float32"), interpret=True),
    )


def random_matrix(rows: int, width: int, rng: np.random.Generator) -> pk.PackedMatrix:
    """Return arrays of any values but for the levels: half of the offsets near the codes, half anywhere."""
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
