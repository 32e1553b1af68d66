"""Quantization gives the same bits where its caller has enabled 64 bits."""

import jax
import numpy as np
import pytest

from qmoe_jax.quantization import (
    add_tokens,
    empty_hessians,
    factorize,
    gptq,
    relative_error,
    ternary_grid,
    uniform_grid,
)


@pytest.mark.parametrize(
    ("grid", "group_size"), [(ternary_grid(), None), (uniform_grid(3), 7)], ids=["ternary", "uniform, groups"]
)
def test_64_bits_change_nothing(grid, group_size):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape, np.float32) for shape in ((2, 5, 24), (40, 24)))
    expert = np.arange(40, dtype=np.int32) % 2

    def run():
        hessian = add_tokens(empty_hessians(2, 24), x, expert).sums
        factor = factorize(hessian, activation_order=True)
        result = gptq(w, hessian, grid, group_size=group_size, activation_order=True)
        return [*jax.tree.leaves(result), relative_error(result, w, factor)]

    expected = run()
    with jax.enable_x64(True):
        found = run()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
