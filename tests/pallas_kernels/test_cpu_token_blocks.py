"""Blocks hold every token once, beside those of its expert, and give back what was dispatched to them."""

import numpy as np
import pytest

from pallas_kernels.cpu.token_blocks import MAX_LANES, expert_blocks, single_token_blocks


def test_blocks_hold_every_token_once_beside_those_of_its_expert():
    expert_index = np.repeat(np.arange(9), [1, 2, 8, 9, 16, 17, 33, 64, 150]).astype(np.int32)
    np.random.default_rng(0).shuffle(expert_index)
    blocks = expert_blocks(expert_index)
    assert sorted(blocks.token) == list(range(300))
    for block, expert in enumerate(blocks.expert):
        inside = blocks.token[blocks.first_token[block] : blocks.first_token[block + 1]]
        assert (expert_index[inside] == expert).all()
        assert 0 < len(inside) <= blocks.lanes[block] <= max(8, 2 * len(inside) - 1) <= 2 * MAX_LANES


@pytest.mark.parametrize("blocks_of", [expert_blocks, single_token_blocks])
@pytest.mark.parametrize("width", [1, 15, 513])
def test_combine_gives_back_what_was_dispatched_times_the_scale(blocks_of, width):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((150, width)).astype(np.float32)
    blocks = blocks_of((rng.integers(0, 12, 150) ** 2).astype(np.int32))
    y = np.full_like(x, np.nan)
    blocks.combine(blocks.dispatch(x), np.full(150, 2, np.float32), y)
    np.testing.assert_array_equal(y, 2 * x)
