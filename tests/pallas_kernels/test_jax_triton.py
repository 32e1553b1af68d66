"""The jax-triton kernels keep the contract of the ops, interpreted: products, transforms, corrupt streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import triton_interpreter  # isort: skip - skips this module where jax-triton is not installed

from pallas_kernels.matmul.jax_triton import packed_matmul as matmul
from pallas_kernels.matvec.jax_triton import matvec
from pallas_kernels.mlp.jax_triton import packed_mlp as mlp
from pallas_kernels.mlp.reference import packed_mlp as reference_mlp
from tests.helpers import packed_samples as samples
from tests.pallas_kernels.test_contract import CASES, assert_products
from tests.pallas_kernels.test_safety import corrupted

every_op = pytest.mark.parametrize("op", [matvec, matmul])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr("jax_triton.triton_call", triton_interpreter.triton_call)


@every_op
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("book, shape, count", CASES.values(), ids=CASES)
def test_products(op, dtype, book, shape, count):
    sample = samples.sample(samples.CODEBOOKS[book](), shape, levels=dtype)
    x, expert_index = samples.tokens(sample, count, dtype=dtype)
    found = op(sample.packed, x, expert_index)
    assert_products(found, sample, x, expert_index, units=1)  # the interpreter cuts off, the compiler rounds


@every_op
def test_no_token(op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 5))
    assert op(sample.packed, *samples.tokens(sample, 0)).shape == (0, 3)


@every_op
def test_expert_out_of_range_is_the_nearest(op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40))
    x, _ = samples.tokens(sample, 2)
    found = op(sample.packed, x, jnp.array([-5, 99], jnp.int32))
    assert_products(found, sample, x, jnp.array([0, 1], jnp.int32))


@every_op
def test_vmap_over_layers(op):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40))
    layers = jax.tree.map(lambda array: jnp.stack([array, array]), sample.packed)
    x, expert_index = samples.tokens(sample, 3)
    for found in jax.vmap(op, in_axes=(0, None, None))(layers, x, expert_index):
        assert_products(found, sample, x, expert_index)


@every_op
@pytest.mark.parametrize("book", ["tunstall-8", "tunstall-10"])
@pytest.mark.parametrize("seed", range(4))
def test_corrupt_streams_give_finite_products(op, book, seed):
    sample = samples.sample(samples.CODEBOOKS[book](), (3, 5, 70))
    x, _ = samples.tokens(sample, 9)
    packed, rng = corrupted(sample.packed, seed), np.random.default_rng(seed)
    entries = rng.integers(0, 2**32, packed.table.entries.shape, np.uint32)
    unknown = dataclasses.replace(packed, table=dataclasses.replace(packed.table, entries=entries))
    expert_index = jnp.asarray(np.arange(9) % 5 - 1, jnp.int32)
    for damaged in (packed, unknown):
        assert np.isfinite(op(damaged, x, expert_index)).all()


@pytest.mark.parametrize("count", [1, 9])
def test_mlp(count, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (2, 48, 16)), samples.sample(book, (2, 16, 48))
    x, expert_index = samples.tokens(wi, count)
    operands = (wi.packed,), wo.packed, x, expert_index, jnp.linspace(0.2, 0.9, count)
    assert relative(mlp(*operands, activation="gelu"), reference_mlp(*operands, activation="gelu")) < 2e-6
