"""Tokens travel to the device that holds their expert and come back, by all-to-all: no token is dropped.

A device reserves the same number of seats for every other one, about twice what even routing needs, so that
memory and traffic are bounded whatever the routing. Tokens that find no seat go in the next turn; the number
of turns is decided on the devices and is the same on all of them. Even routing takes one turn, and all tokens
for one expert at most half as many as there are devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

SPARE_SEATS = 16
"""Seats beyond twice the average: a few tokens, as in a step of generation, all go at once."""


@dataclasses.dataclass(frozen=True)
class ExpertRanges:
    """The experts of each device: consecutive ranges, as even as possible.

    Every device holds as many experts as the largest range has (`held`), so that shapes are equal. Where the
    experts do not divide evenly, some devices hold a neighbour's expert too, to which they are sent no token.

    Attributes:
        num_experts: experts of a layer.
        devices: devices that share them.
    """

    num_experts: int
    devices: int

    @property
    def held(self) -> int:
        """Experts per device."""
        return -(-self.num_experts // self.devices)

    def experts(self, device: int) -> slice:
        """Return the experts that a device holds."""
        first = min(device * self.num_experts // self.devices, self.num_experts - self.held)
        return slice(first, first + self.held)

    def locate(self, expert: Int[Array, "token"]) -> tuple[Int[Array, "token"], Int[Array, "token"]]:
        """Return (device, index among the experts held there) of each token's expert."""
        begins = np.arange(self.devices) * self.num_experts // self.devices
        devices = np.searchsorted(begins, np.arange(self.num_experts), side="right") - 1
        firsts = np.array([self.experts(device).start for device in devices])
        indices = np.arange(self.num_experts) - firsts
        return jnp.asarray(devices, jnp.int32)[expert], jnp.asarray(indices, jnp.int32)[expert]


def seats(tokens: int, devices: int) -> int:
    """Return the tokens that a device sends each other one per turn, given how many it has."""
    return min(tokens, 2 * -(-tokens // devices) + SPARE_SEATS)


def exchanged(
    run: Callable[[Array, Array, Array], Array],
    x: Float[Array, "token embed"],
    expert: Int[Array, "token"],
    scale: Float[Array, "token"],
    ranges: ExpertRanges,
    axis: str,
) -> Float[Array, "token embed"]:
    """Return each token's expert output; for code under `shard_map` over the mesh axis `axis`.

    Memory per turn and device: `devices * seats` rows of inputs, as many as arrive, and their outputs. Tokens
    of an expert arrive in the order of the whole batch.

    Args:
        run: called as `run(x, index, scale)` on the device that holds the experts, with the index among those
            held there. Empty seats are rows of zeros, of scale 0, whose index is `ranges.held`.
        x: this device's tokens.
        expert: the expert of each, in range.
        scale: router probability of each.
        ranges: the experts of each device.
        axis: name of the mesh axis.
    """
    tokens, devices = x.shape[0], ranges.devices
    capacity = seats(tokens, devices)
    device, index = ranges.locate(expert)
    chosen = jax.nn.one_hot(device, devices, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=1, dtype=jnp.int32)
    own_turn, seat = rank // capacity, device * capacity + rank % capacity

    def swap(values: Array) -> Array:
        return lax.all_to_all(values, axis, split_axis=0, concat_axis=0, tiled=True)

    def take_turn(turn: int | Array, y: Array) -> Array:
        mine = jnp.where(own_turn == turn, seat, devices * capacity)  # out of range: not in this turn

        def seated(values: Array, empty: int) -> Array:
            seats = jnp.full((devices * capacity, *values.shape[1:]), empty, values.dtype)
            return swap(seats.at[mine].set(values, mode="drop"))

        back = swap(run(seated(x, 0), seated(index, ranges.held), seated(scale, 0)))
        return jnp.where((own_turn == turn)[:, None], back.at[mine].get(mode="fill", fill_value=0), y)

    y = jnp.zeros_like(x)
    if capacity == tokens:
        return take_turn(0, y)
    turns = lax.pmax(jnp.max(own_turn) + 1, axis)
    return lax.fori_loop(0, turns, take_turn, y)
