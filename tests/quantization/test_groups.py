"""The arithmetic of groups and blocks, against going through the columns one by one."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from qmoe_jax.quantization.groups import GroupSchedule, join_groups, split_groups

sizes = st.integers(1, 60)


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(width=sizes, block_size=st.integers(1, 40), group_size=sizes)
def test_each_group_is_found_last_in_the_block_of_its_first_column(width, block_size, group_size):
    schedule = GroupSchedule(width, block_size, min(group_size, width))
    group_size = schedule.group_size
    found_in = {}
    for block in range(schedule.num_blocks):
        start = block * block_size
        assert start + block_size <= schedule.padded_width
        begins = any(i % group_size == 0 for i in range(start, start + block_size))
        assert schedule.finds_levels(block) == begins
        if schedule.whole_row or not begins:
            continue
        first = schedule.first_group(block)
        last = first + schedule.groups_per_block
        assert last <= schedule.padded_groups
        assert start <= first * group_size
        assert last * group_size <= start + schedule.span <= schedule.padded_width
        found_in |= dict.fromkeys(range(first, last), block)
    if not schedule.whole_row:
        for group in range(schedule.num_groups):
            assert found_in[group] == group * group_size // block_size
    assert schedule.num_groups == len(range(0, width, group_size))


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(width=st.integers(1, 9), group_size=st.integers(1, 9))
def test_join_undoes_split(width, group_size):
    x = np.arange(2 * width).reshape(2, width)
    groups = split_groups(jnp.asarray(x), group_size)
    assert groups.shape == (2, -(-width // group_size), group_size)
    np.testing.assert_array_equal(join_groups(groups, width), x)
