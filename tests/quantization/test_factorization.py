"""The factor of a Hessian, against upstream's Cholesky of the inverse."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import damping_term, factorize
from tests.helpers import golden

A, S = golden.hessian("A"), golden.hessian("S")


def half(factor):
    """L with the damped Hessian LᵀL, in float64."""
    return np.sqrt(np.asarray(factor.curvature, np.float64))[:, :, None] * np.asarray(
        factor.lower, np.float64
    )


def test_upstreams_damping():
    np.testing.assert_allclose(damping_term(A, 0.1), golden.vectors["A.pd0.1.damp"][:, 0], rtol=1e-6)


@pytest.mark.parametrize("expert", [0, 2])
def test_the_inverse_of_the_factor_is_upstreams_upper_factor(expert):
    lower = half(factorize(A, 0.1))[expert]
    want = golden.vectors[f"A.pd0.1.Hinv_upper_e{expert}"]
    np.testing.assert_allclose(np.linalg.inv(lower).T, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_the_factor_is_lower_triangular_and_gives_back_the_damped_hessian():
    factor = factorize(A, 0.1)
    np.testing.assert_array_equal(factor.lower, jnp.tril(factor.lower))
    np.testing.assert_allclose(jnp.diagonal(factor.lower, axis1=1, axis2=2), 1, rtol=1e-6)
    lower = half(factor)
    damped = A + np.asarray(damping_term(A, 0.1))[:, None, None] * np.eye(256)
    for expert in (0, 2, 3):
        error = np.abs(lower[expert].T @ lower[expert] - damped[expert]).max()
        assert error < 1e-6 * np.abs(damped[expert]).max()


def test_no_tokens_is_a_fallback():
    factor = factorize(A, 0.1)
    np.testing.assert_array_equal(factor.fallback, [False, True, False, False])
    np.testing.assert_array_equal(factor.lower[1], np.eye(256))
    np.testing.assert_array_equal(factor.curvature[1], np.ones(256))


@pytest.mark.parametrize("activation_order", [False, True])
def test_indefinite_and_nan_hessians_are_fallbacks_and_leave_the_others_alone(activation_order):
    factor = factorize(S, 0.1, activation_order=activation_order)
    np.testing.assert_array_equal(factor.fallback, [False, True, False, True])
    alone = factorize(S[[0, 2]], 0.1, activation_order=activation_order)
    np.testing.assert_allclose(factor.lower[np.array([0, 2])], alone.lower, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(factor.lower[np.array([1, 3])], np.stack([np.eye(256)] * 2))


def test_an_infinite_hessian_is_a_fallback():
    hessian = np.eye(4, dtype=np.float32)[None].repeat(2, 0)
    hessian[1, 2, 2] = np.inf
    np.testing.assert_array_equal(factorize(hessian).fallback, [False, True])


def test_activation_order_is_by_the_diagonal_and_stable():
    assert factorize(A, 0.1).order is None
    order = np.asarray(factorize(A, 0.1, activation_order=True).order)
    for expert in range(4):
        np.testing.assert_array_equal(
            order[expert], np.argsort(-np.diagonal(A[expert]), kind="stable"), f"expert {expert}"
        )


def test_a_larger_damping_needs_no_new_compilation():
    factorize(A, 0.1)
    before = factorize._cache_size()
    factorize(A, 0.25)
    assert factorize._cache_size() == before
