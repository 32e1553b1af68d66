"""Tokens in blocks: each in a lane of its own, of a block of its expert; which experts have any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul.grouping import group_tokens, lanes_for

GROUP = jax.jit(group_tokens, static_argnums=(1, 2))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=12, max_size=12), st.sampled_from([1, 4]))
def test_every_token_sits_in_a_block_of_its_expert(experts, lanes):
    index = jnp.asarray(experts, jnp.int32)
    blocks = GROUP(index, 5, lanes)
    lane = np.asarray(blocks.lane)
    assert len(set(lane.tolist())) == len(experts)
    assert (np.asarray(blocks.expert)[lane // lanes] == index).all()
    counts = np.bincount(experts, minlength=5)
    assert (np.diff(blocks.bounds) == -(-counts // lanes)).all()
    assert (np.asarray(blocks.expert)[blocks.bounds[-1] :] == -1).all()
    busy, count = blocks.busy_experts()
    assert np.asarray(busy)[: int(count[0])].tolist() == np.flatnonzero(counts).tolist()


def test_dispatch_and_combine_are_inverse():
    index = jnp.array([3, 0, 3, 3, 1, 0], jnp.int32)
    blocks = group_tokens(index, 4, 2)
    x = jnp.arange(18.0).reshape(6, 3)
    dispatched = blocks.dispatch(x)
    assert dispatched.shape == (blocks.count, 2, 3)
    assert dispatched.sum() == x.sum()  # zeros elsewhere
    assert (blocks.combine(dispatched) == x).all()
    assert blocks.dispatch(x[:, 0]).shape == (blocks.count, 2)


@pytest.mark.parametrize("tokens, experts, lanes", [(1, 64, 8), (100, 4, 32), (5000, 2, 256), (9, 1, 16)])
def test_lanes_fit_the_even_share(tokens, experts, lanes):
    assert lanes_for(tokens, experts, 256) == lanes
