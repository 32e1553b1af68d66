"""`dense_matmul`, one suite for every backend, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dense_matmul import dense_matmul

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def operands(tokens: int, shape: tuple[int, int]):
    generate = np.random.default_rng(sum(shape) + tokens)
    x = jnp.asarray(generate.standard_normal((tokens, shape[0])), jnp.float32)
    return x, jnp.asarray(generate.standard_normal(shape), jnp.bfloat16)


def assert_product(found, x, w):
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(initial=0))


@every_backend
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 1025), (33, 2100), (2080, 48)])
def test_products_match_float64(backend, tokens, shape):
    x, w = operands(tokens, shape)
    assert_product(dense_matmul(x, w, backend=backend), x, w)


@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(1, 5), inputs=st.integers(1, 40), outputs=st.integers(1, 70))
def test_products_of_any_shape_match_float64(tokens, inputs, outputs):
    x, w = operands(tokens, (inputs, outputs))
    assert_product(dense_matmul(x, w, backend="cpu"), x, w)


@every_backend
def test_values_that_are_not_finite_reach_the_result(backend):
    x, w = operands(2, (16, 20))
    x = x.at[1, 3].set(jnp.nan)
    found = np.asarray(dense_matmul(x, w, backend=backend))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@every_backend
def test_products_under_jit_and_vmap(backend):
    x, w = operands(3, (16, 20))
    run = jax.jit(jax.vmap(lambda w: dense_matmul(x, w, backend=backend)))
    for found, factor in zip(run(jnp.stack([w, 2 * w])), (1, 2), strict=True):
        assert_product(found, x, factor * w)


def test_products_have_the_same_bits_every_time():
    x, w = operands(3, (2080, 96))
    first = np.asarray(dense_matmul(x, w, backend="cpu"))
    for _ in range(30):
        np.testing.assert_array_equal(dense_matmul(x, w, backend="cpu"), first)


def test_operands_that_do_not_fit_are_refused():
    x, w = operands(2, (16, 20))
    with pytest.raises(ValueError, match=r"found \(2, 16\) and \(20, 16\)"):
        dense_matmul(x, w.T)
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(lambda x: dense_matmul(x, w).sum())(x)
    with pytest.raises(NotImplementedError, match="no implementation"):
        dense_matmul(x, w, backend="pallas")
