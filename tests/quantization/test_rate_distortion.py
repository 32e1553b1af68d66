"""The grid that weighs error against bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import (
    factorize,
    gptq,
    gptq_with_factor,
    rate_distortion_grid,
    round_to_nearest,
    ternary_grid,
)
from qmoe_jax.quantization.gptq import quantize_in_order
from tests.helpers import golden
from tests.helpers.golden_digits import Problem

W, H = golden.vectors["A.W"], golden.hessian("A")


def test_a_rate_of_zero_is_the_ternary_grid():
    free, plain = gptq(W, H, rate_distortion_grid(0.0)), gptq(W, H, ternary_grid())
    for number, (w, h) in enumerate(zip(W, H, strict=True)):
        problem = Problem.of(w, h, fallback=bool(plain.fallback[number]))
        expert = problem.replay(plain.digits[number], plain.levels[number])
        assert expert.assert_same_up_to_a_border(free.digits[number]) > 0.98
        problem.replay(free.digits[number], free.levels[number]).assert_digits_follow()
    np.testing.assert_array_equal(free.levels, plain.levels)


def test_each_digit_has_the_least_cost():
    bits, rate, curvature = (0.5, 3.0, 4.0), 0.2, 2.5
    grid = rate_distortion_grid(rate, bits)
    w = np.linspace(-3, 3, 101, dtype=np.float32)
    low, high = -2.0, 1.5
    digits = grid.digit(jnp.asarray(w), (jnp.array([low]), jnp.array([high])), jnp.float32(curvature))
    cost = np.stack([curvature * (w - v) ** 2 + rate * b for v, b in zip((0, low, high), bits, strict=True)])
    np.testing.assert_allclose(cost[digits, np.arange(101)], cost.min(0), rtol=1e-5)
    assert set(np.asarray(digits)) == {0, 1, 2}


def test_a_higher_rate_buys_zeros_for_error():
    factor = factorize(H, 0.1)
    scale = float(factor.curvature[0].mean() * W[0].var())
    runs = [gptq_with_factor(W, factor, rate_distortion_grid(scale * rate)) for rate in (0.0, 0.1, 0.3, 1.0)]
    zeros = [float((run.digits[0] == 0).mean()) for run in runs]
    errors = [float(run.error[0]) for run in runs]
    assert zeros == sorted(zeros) and zeros[-1] > zeros[0] + 0.03
    assert errors == sorted(errors)


def test_a_new_rate_needs_no_new_compilation():
    factor = factorize(H, 0.1)
    gptq_with_factor(W, factor, rate_distortion_grid(0.1))
    before = quantize_in_order._cache_size()
    gptq_with_factor(W, factor, rate_distortion_grid(0.2, level_scale=1.1))
    assert quantize_in_order._cache_size() == before


def test_levels_are_the_scaled_extremes():
    q = round_to_nearest(W, rate_distortion_grid(0.0, level_scale=1.25))
    np.testing.assert_allclose(q.levels, 1.25 * round_to_nearest(W, ternary_grid()).levels, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1.0,), "rate must be finite and >= 0, found -1.0"),
        ((float("nan"),), "rate must be finite"),
        ((1.0, (1.0, 0.5, 2.0)), "the first the least"),
        ((1.0, (1.0, 2.0)), "three finite numbers"),
        ((1.0, (0.1, 2.0, 2.0), 0.0), "level_scale must be finite and > 0, found 0.0"),
    ],
)
def test_rates_bits_and_scales_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rate_distortion_grid(*arguments)


def test_another_order_of_columns_needs_no_new_compilation():
    gptq_with_factor(W, factorize(H, 0.1), rate_distortion_grid(0.1))
    before = quantize_in_order._cache_size()
    gptq_with_factor(W, factorize(H, 0.1, activation_order=True), rate_distortion_grid(0.1))
    assert quantize_in_order._cache_size() == before
