"""The contract of the ops, one suite for every implementation: products and weights against dense float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.helpers import packed_samples as samples
from tests.helpers.kernel_contract import BACKENDS, CASES, IMPLEMENTATIONS, assert_products

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_implementation = pytest.mark.parametrize("backend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
every_case = pytest.mark.parametrize("book, shape, count", CASES.values(), ids=CASES)


@every_implementation
@every_case
def test_products_match_float64(backend, book, shape, count):
    sample = samples.sample(samples.CODEBOOKS[book](), shape)
    x, expert_index = samples.tokens(sample, count)
    found = pk.packed_matmul(sample.packed, x, expert_index, backend=backend)
    assert_products(found, sample, x, expert_index)


@every_backend
@pytest.mark.parametrize("count", [1, 8, 40])
def test_a_backend_chooses_among_its_implementations(backend, count):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 7, 64))
    x, expert_index = samples.tokens(sample, count)
    found = pk.packed_matmul(sample.packed, x, expert_index, backend=backend)
    assert_products(found, sample, x, expert_index)


@every_implementation
def test_products_at_densities_that_the_codebook_was_not_made_for(backend):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 4, 77), p_zero=[0.0, 0.3, 1.0])
    x, expert_index = samples.tokens(sample, 6)
    found = pk.packed_matmul(sample.packed, x, expert_index, backend=backend)
    assert_products(found, sample, x, expert_index)


@every_implementation
def test_products_of_bfloat16_tokens_and_float32_levels(backend):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (3, 6, 40), levels="float32")
    x, expert_index = samples.tokens(sample, 7, dtype="bfloat16")
    found = pk.packed_matmul(sample.packed, x, expert_index, backend=backend)
    assert_products(found, sample, x, expert_index)


@every_implementation
def test_a_product_of_no_token_is_empty(backend):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 5))
    x, expert_index = samples.tokens(sample, 0)
    assert pk.packed_matmul(sample.packed, x, expert_index, backend=backend).shape == (0, 3)


@every_implementation
def test_an_expert_out_of_range_is_the_nearest(backend):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40))
    x, _ = samples.tokens(sample, 2)
    found = pk.packed_matmul(sample.packed, x, jnp.array([-5, 99], jnp.int32), backend=backend)
    assert_products(found, sample, x, jnp.array([0, 1], jnp.int32))


@every_implementation
def test_products_under_jit_and_vmap_over_layers(backend):
    layers = [samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 4, 60), seed=seed) for seed in range(3)]
    capacity = max(layer.packed.codes.shape[1] for layer in layers)
    padded = [
        dataclasses.replace(p, codes=np.pad(p.codes, ((0, 0), (0, capacity - p.codes.shape[1]))))
        for p, _ in layers
    ]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *padded)
    x, expert_index = samples.tokens(layers[0], 3)
    run = jax.jit(jax.vmap(functools.partial(pk.packed_matmul, backend=backend), in_axes=(0, None, None)))
    for found, layer in zip(run(stacked, x, expert_index), layers, strict=True):
        assert_products(found, layer, x, expert_index)


@every_implementation
def test_a_product_has_no_derivative(backend):
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 2, 3))
    x, expert_index = samples.tokens(sample, 1)
    with pytest.raises(NotImplementedError, match=r"no derivative.*unpack"):
        jax.grad(lambda x: pk.packed_matmul(sample.packed, x, expert_index, backend=backend).sum())(x)


@every_backend
@every_case
def test_unpacked_weights_are_exact(backend, book, shape, count):
    sample = samples.sample(samples.CODEBOOKS[book](), shape)
    dtype = jnp.dtype("float32" if count < 9 else "bfloat16")
    found = pk.unpack(sample.packed, dtype, backend=backend)
    assert found.dtype == dtype
    assert (np.asarray(found, np.float64) == sample.weights).all()


@every_backend
@pytest.mark.parametrize("activation, gated, count", [("relu", False, 1), ("gelu", True, 40)])
def test_an_expert_matches_float64(backend, activation, gated, count, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, gate = (samples.sample(book, (2, 48, 16), seed=seed, p_zero=0.6) for seed in range(2))
    wo = samples.sample(book, (2, 16, 48), seed=2, p_zero=0.6)
    x, expert_index = samples.tokens(wi, count)
    scale = jnp.linspace(0.2, 0.9, count)
    hidden = jax.nn.relu if activation == "relu" else jax.nn.gelu
    wanted = hidden(np.float32(samples.products(wi, x, expert_index)[0]))
    if gated:
        wanted = wanted * samples.products(gate, x, expert_index)[0].astype(np.float32)
    wanted = np.asarray(scale)[:, None] * samples.products(wo, wanted, expert_index)[0]
    pair = (wi.packed, gate.packed) if gated else wi.packed
    found = pk.packed_mlp(pair, wo.packed, x, expert_index, scale, activation, backend=backend)
    assert relative(found, wanted) < 2e-6


@every_backend
def test_an_expert_without_scale_in_bfloat16(backend, relative):
    book = samples.CODEBOOKS["tunstall-8"]()
    wi, wo = samples.sample(book, (2, 48, 16)), samples.sample(book, (2, 16, 48))
    x, expert_index = samples.tokens(wi, 6, dtype="bfloat16")
    found = pk.packed_mlp(wi.packed, wo.packed, x, expert_index, backend=backend)
    exact = pk.packed_mlp(wi.packed, wo.packed, x.astype(jnp.float32), expert_index, backend="reference")
    assert found.dtype == jnp.bfloat16
    assert relative(found, exact) < 2**-8
