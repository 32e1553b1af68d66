"""The relative output error, against the plain formula in float64."""

import numpy as np
import pytest

from qmoe_jax.quantization import (
    factorize,
    gptq_with_factor,
    relative_error,
    round_to_nearest,
    ternary_grid,
    uniform_grid,
)


def example(experts=3, out=7, width=40, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) / width**0.5
    x = (rng.standard_normal((experts, tokens, width)) @ mix).astype(np.float32)
    return rng.standard_normal((experts, out, width), np.float32), x.swapaxes(1, 2) @ x


def plain(w, values, hessian, damping):
    """tr(D H Dᵀ) / tr(W H Wᵀ) in float64, the Hessian damped by a share of the mean of its diagonal."""
    w, values, hessian = (np.asarray(array, np.float64) for array in (w, values, hessian))
    mean = np.diagonal(hessian, axis1=1, axis2=2).mean(1)
    damped = hessian + (damping * mean)[:, None, None] * np.eye(w.shape[2])
    energy = lambda d: np.einsum("eoi,eij,eoj->e", d, damped, d)
    return energy(values - w) / energy(w)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize(
    "width, group_size, damping", [(40, None, 0.1), (40, 16, 0.01), (5, None, 1.0), (1, None, 0.1)]
)
def test_the_relative_error_is_that_of_the_damped_hessian(width, group_size, damping, activation_order):
    w, hessian = example(width=width)
    factor = factorize(hessian, damping, activation_order=activation_order)
    q = gptq_with_factor(w, factor, ternary_grid(), group_size=group_size)
    np.testing.assert_allclose(relative_error(q, w, factor), plain(w, q.values, hessian, damping), rtol=3e-6)


def test_the_relative_error_after_a_fallback_is_that_of_the_identity():
    """No tokens, and a Hessian without a factor."""
    w, hessian = example()
    hessian[0], hessian[1] = 0, np.nan
    factor = factorize(hessian)
    q = gptq_with_factor(w, factor, uniform_grid(bits=2))
    found = np.asarray(relative_error(q, w, factor))
    identity = np.broadcast_to(np.eye(40), hessian[:2].shape)
    np.testing.assert_allclose(found[:2], plain(w[:2], q.values[:2], identity, 0.0), rtol=3e-6)
    np.testing.assert_allclose(found[2:], plain(w[2:], q.values[2:], hessian[2:], 0.1), rtol=3e-6)


def test_the_relative_error_without_a_hessian_is_that_of_the_weights():
    w, _ = example()
    q = round_to_nearest(w, ternary_grid())
    identity = np.broadcast_to(np.eye(40), (3, 40, 40))
    np.testing.assert_allclose(relative_error(q, w, None), plain(w, q.values, identity, 0.0), rtol=3e-6)


def test_the_relative_error_of_zeros_is_zero_and_of_a_nan_weight_is_nan():
    w, hessian = example()
    w[0], w[1, 2, 3] = 0, np.nan
    factor = factorize(hessian)
    found = np.asarray(relative_error(gptq_with_factor(w, factor, ternary_grid()), w, factor))
    np.testing.assert_array_equal(found[:1], [0])
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])
