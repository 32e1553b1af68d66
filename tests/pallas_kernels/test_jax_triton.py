"""The jax-triton kernels keep the contract of the ops, interpreted: products, transforms, corrupt streams."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import reference
from pallas_kernels.mlp.composed import composed_mlp
from tests.helpers import packed_samples as samples
from tests.helpers import triton_interpreter
from tests.helpers.kernel_contract import CASES, assert_products

every_route = pytest.mark.parametrize("route", ["separate", "gathered"])


@pytest.fixture(scope="module")
def jax_triton():
    return triton_interpreter.interpreted_kernels()


@pytest.fixture
def multiply(jax_triton, route, monkeypatch):
    """One route of the product, interpreted."""
    monkeypatch.setattr("jax_triton.triton_call", triton_interpreter.triton_call)
    return getattr(jax_triton, route)


@every_route
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("book, shape, count", CASES.values(), ids=CASES)
def test_products_match_float64(multiply, dtype, book, shape, count):
    sample = samples.sample(samples.CODEBOOKS[book](), shape, levels=dtype)
    x, expert_index = samples.tokens(sample, count, dtype=dtype)
    found = multiply(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index, units=1)  # the interpreter cuts off, the compiler rounds


@every_route
def test_a_product_of_no_token_is_empty(multiply):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 5))
    assert multiply(sample.packed, *samples.tokens(sample, 0)).shape == (0, 3)


@every_route
def test_an_expert_out_of_range_is_the_nearest(multiply):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40))
    x, _ = samples.tokens(sample, 2)
    found = multiply(sample.packed, x, jnp.array([-5, 99], jnp.int32))
    assert_products(found, sample, x, jnp.array([0, 1], jnp.int32))


@every_route
def test_products_under_vmap_over_layers(multiply):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40))
    layers = jax.tree.map(lambda array: jnp.stack([array, array]), sample.packed)
    x, expert_index = samples.tokens(sample, 3)
    for found in jax.vmap(multiply, in_axes=(0, None, None))(layers, x, expert_index):
        assert_products(found, sample, x, expert_index)


@every_route
@pytest.mark.parametrize("book", ["tunstall-8", "tunstall-10"])
@pytest.mark.parametrize("seed", range(4))
def test_corrupt_streams_give_finite_products(multiply, book, seed):
    sample = samples.sample(samples.CODEBOOKS[book](), (3, 5, 70))
    x, _ = samples.tokens(sample, 9)
    packed, rng = samples.corrupted(sample.packed, seed), np.random.default_rng(seed)
    entries = rng.integers(0, 2**32, packed.table.entries.shape, np.uint32)
    unknown = dataclasses.replace(packed, table=dataclasses.replace(packed.table, entries=entries))
    expert_index = jnp.asarray(np.arange(9) % 5 - 1, jnp.int32)
    for damaged in (packed, unknown):
        assert np.isfinite(multiply(damaged, x, expert_index)).all()


@pytest.mark.parametrize("route", ["packed_matmul"])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_an_expert_matches_the_reference(multiply, count, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (2, 48, 16)), samples.sample(book, (2, 16, 48))
    x, expert_index = samples.tokens(wi, count)
    operands = (wi.packed,), wo.packed, x, expert_index, jnp.linspace(0.2, 0.9, count)
    found, wanted = (
        functools.partial(composed_mlp, product, activation="gelu")(*operands)
        for product in (multiply, reference.packed_matmul)
    )
    assert relative(found, wanted) < 2e-6
