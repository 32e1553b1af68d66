"""Tokens grouped by expert on the device, in blocks of a fixed number of lanes: shapes are static."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import pytree


@pytree.register(leaves=("expert", "lane"), static=("lanes",))
@dataclasses.dataclass(frozen=True)
class TokenBlocks:
    """Blocks that each hold tokens of one expert.

    Attributes:
      expert: the expert of each block, -1 where it holds no token.
      lane: where each token sits, counted over all blocks.
      lanes: tokens that fit a block.
    """

    expert: Int32[Array, "block"]
    lane: Int32[Array, "t"]
    lanes: int

    def spread(self, x: Float[Array, "t width"]) -> Float[Array, "block lanes width"]:
        """The tokens in their blocks, zeros elsewhere."""
        flat = jnp.zeros((self.expert.shape[0] * self.lanes, x.shape[1]), x.dtype).at[self.lane].set(x)
        return flat.reshape(-1, self.lanes, x.shape[1])

    def collect(self, y: Float[Array, "block lanes width"]) -> Float[Array, "t width"]:
        """The reverse of `spread`."""
        return y.reshape(-1, y.shape[-1])[self.lane]


def group_tokens(expert_index: Int32[Array, "t"], num_experts: int, lanes: int) -> TokenBlocks:
    """Blocks of `lanes` tokens; as many as the worst routing needs. `expert_index` must be in range."""
    tokens = expert_index.shape[0]
    blocks = tokens // lanes + min(num_experts, tokens)
    counts = jnp.bincount(expert_index, length=num_experts)
    blocks_end = jnp.cumsum((counts + lanes - 1) // lanes)
    first_block = jnp.concatenate([jnp.zeros(1, blocks_end.dtype), blocks_end[:-1]])
    first_token = jnp.cumsum(counts) - counts
    order = jnp.argsort(expert_index, stable=True)
    sorted_index = expert_index[order]
    rank = jnp.arange(tokens) - first_token[sorted_index]
    lane = jnp.zeros(tokens, jnp.int32).at[order].set(first_block[sorted_index] * lanes + rank)
    expert = jnp.searchsorted(blocks_end, jnp.arange(blocks), side="right").astype(jnp.int32)
    return TokenBlocks(jnp.where(expert < num_experts, expert, -1), lane, lanes)


def lanes_for(tokens: int, num_experts: int, most: int) -> int:
    """Lanes that the even share of an expert fills: a power of two between 8 and `most`."""
    share = -(-tokens // max(num_experts, 1))
    return min(max(8, 1 << (share - 1).bit_length()), most)
