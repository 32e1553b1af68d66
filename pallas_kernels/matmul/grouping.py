"""Groups tokens by expert on the device, in blocks of a fixed number of lanes, so that shapes are static."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import pytree


@pytree.register(leaves=("expert", "lane", "bounds"), static=("lanes",))
@dataclasses.dataclass(frozen=True)
class TokenBlocks:
    """Blocks that each hold tokens of one expert, in the order of the experts.

    Attributes:
        expert: the expert of each block, -1 for a block without tokens.
        lane: the place of each token, counted over all blocks.
        bounds: the blocks of expert e are those from `bounds[e]` to before `bounds[e + 1]`.
        lanes: tokens per block.
    """

    expert: Int32[Array, "block"]
    lane: Int32[Array, "t"]
    bounds: Int32[Array, "bound"]
    lanes: int

    @property
    def count(self) -> int:
        """Number of blocks, including those without tokens."""
        return self.expert.shape[0]

    def dispatch(self, x: Float[Array, "t *width"]) -> Float[Array, "block lanes *width"]:
        """Place values of the tokens in their blocks, zeros elsewhere."""
        flat = jnp.zeros((self.count * self.lanes, *x.shape[1:]), x.dtype).at[self.lane].set(x)
        return flat.reshape(-1, self.lanes, *x.shape[1:])

    def combine(self, y: Float[Array, "block lanes width"]) -> Float[Array, "t width"]:
        """Reverse `dispatch`."""
        return y.reshape(-1, y.shape[-1])[self.lane]

    def busy_experts(self) -> tuple[Int32[Array, "busy"], Int32[Array, "1"]]:
        """Return the experts that have tokens, in their order and then zeros, and their number.

        There is room for as many as the tokens can reach.
        """
        num_experts = self.bounds.shape[0] - 1
        busy = self.bounds[1:] > self.bounds[:-1]
        room = min(num_experts, self.lane.shape[0])
        place = jnp.where(busy, jnp.cumsum(busy) - 1, room)
        experts = jnp.arange(num_experts, dtype=jnp.int32)
        listed = jnp.zeros(room, jnp.int32).at[place].set(experts, mode="drop")
        return listed, jnp.sum(busy, dtype=jnp.int32)[None]


def group_tokens(expert_index: Int32[Array, "t"], num_experts: int, lanes: int) -> TokenBlocks:
    """Return as many blocks of `lanes` tokens as the worst routing needs. `expert_index` must be in range."""
    tokens = expert_index.shape[0]
    blocks = tokens // lanes + min(num_experts, tokens)
    expert_index = expert_index.astype(jnp.int32)
    counts = jnp.bincount(expert_index, length=num_experts).astype(jnp.int32)
    blocks_end = jnp.cumsum((counts + lanes - 1) // lanes, dtype=jnp.int32)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), blocks_end])
    first_token = jnp.cumsum(counts, dtype=jnp.int32) - counts
    order = jnp.argsort(expert_index, stable=True)
    sorted_index = expert_index[order]
    rank = jnp.arange(tokens, dtype=jnp.int32) - first_token[sorted_index]
    place = bounds[sorted_index] * lanes + rank
    lane = jnp.zeros(tokens, jnp.int32).at[order].set(place)
    expert = jnp.searchsorted(blocks_end, jnp.arange(blocks, dtype=jnp.int32), side="right").astype(jnp.int32)
    return TokenBlocks(jnp.where(expert < num_experts, expert, -1), lane, bounds, lanes)


def lanes_for(tokens: int, num_experts: int, most: int) -> int:
    """Return the power of two between 8 and `most` that holds the average number of tokens per expert."""
    average = -(-tokens // max(num_experts, 1))
    return min(max(8, 1 << (average - 1).bit_length()), most)
