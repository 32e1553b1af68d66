"""Every load and store of the kernel is checked against its array, whatever the groups and the numbers."""

import jax
import numpy as np
import pytest

from tests.pallas_kernels.test_quantize_block import GRIDS, block
from tests.pallas_kernels.test_safety_bounds import checking, ran, strays, traced  # noqa: F401


@pytest.mark.parametrize("name", ["ternary", "uniform-4"])
def test_no_group_and_no_number_leads_out_of_an_array(name):
    grid = GRIDS[name]
    rng = np.random.default_rng(0)
    problem = block(grid, (2, 6, 37), groups=2)
    noise = [rng.integers(0, 2**32, array.shape, np.uint32).view(np.float32) for array in problem[:5]]
    groups = rng.integers(-(2**31), 2**31, 6).astype(np.int32)
    problem = type(problem)(*noise, groups)
    traced.clear()
    digits, _, error = ran(jax.jit(lambda p: p.rounded(grid, backend="pallas", interpret=True)), problem)
    assert traced == {"load", "store"}
    assert strays == []
    assert digits.shape == (2, 6, 37)
    assert error.shape == (2, 37)
