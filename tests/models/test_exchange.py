"""Tokens reach their experts on other devices and come back, whatever the routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qmoe_jax.distributed import AXIS, device_mesh
from qmoe_jax.models.exchange import ExpertRanges, exchanged, seats

TOKENS, EMBED = 400, 4


@pytest.mark.parametrize("experts", [1, 3, 8, 10, 37])
def test_every_expert_is_held_where_it_is_looked_for(experts):
    ranges = ExpertRanges(experts, 8)
    device, index = map(np.asarray, ranges.locate(jnp.arange(experts)))
    for expert in range(experts):
        held = ranges.experts(int(device[expert]))
        assert held.stop - held.start == ranges.held
        assert range(experts)[held][index[expert]] == expert
    used = np.bincount(device, minlength=8)
    assert used.max() - used.min() <= 1


def test_seats_are_bounded_by_twice_the_average():
    assert [seats(tokens, 8) for tokens in (1, 16, 22, 24, 80, 8000)] == [1, 16, 22, 22, 36, 2016]


ROUTINGS = {
    "even": lambda experts: np.arange(TOKENS) % experts,
    "random": lambda experts: np.random.default_rng(0).integers(0, experts, TOKENS),
    "one expert": lambda experts: np.full(TOKENS, experts - 1),
}


@pytest.mark.devices
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("experts", [3, 8, 10])
def test_each_token_meets_its_own_expert(experts, routing):
    """The devices tell by what arrives: the expert's number is added to its tokens, times their scale."""
    expert = ROUTINGS[routing](experts).astype(np.int32)
    x = np.arange(TOKENS * EMBED, dtype=np.float32).reshape(TOKENS, EMBED)
    scale = np.arange(1, TOKENS + 1, dtype=np.float32)
    mesh, ranges = device_mesh(8), ExpertRanges(experts, 8)
    held = np.concatenate([np.arange(experts)[ranges.experts(device)] for device in range(8)])

    def on_each_device(held, *tokens):
        run = lambda x, index, scale: (x + held.at[index].get(mode="fill")[:, None]) * scale[:, None]
        return exchanged(run, *tokens, ranges, AXIS)

    program = jax.shard_map(on_each_device, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    found = jax.jit(program)(held.astype(np.float32), x, expert, scale)
    np.testing.assert_array_equal(found, (x + expert[:, None]) * scale[:, None])


@pytest.mark.devices
def test_what_is_sent_in_a_turn_does_not_depend_on_the_routing():
    ranges, tokens = ExpertRanges(16, 8), 8 * 800
    exchange = functools.partial(exchanged, lambda x, index, scale: x, ranges=ranges, axis=AXIS)
    program = jax.shard_map(
        exchange, mesh=device_mesh(8), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    struct = jax.ShapeDtypeStruct
    shapes = (
        struct((tokens, EMBED), jnp.float32),
        struct((tokens,), jnp.int32),
        struct((tokens,), jnp.float32),
    )
    lowered = jax.jit(program).lower(*shapes).as_text()
    sent = [line for line in lowered.splitlines() if "all_to_all" in line and f"x{EMBED}xf32" in line]
    assert len(sent) == 2  # there and back
    assert all(line.rstrip().endswith(f"tensor<{8 * seats(800, 8)}x{EMBED}xf32>") for line in sent)
