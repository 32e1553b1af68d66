"""Hessians of a layer's experts: sums of x xᵀ over the tokens that were routed to each."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import pytree
from pallas_kernels.operands import AnyArray

# Tokens of one matrix product. Large enough that the product outweighs the two passes over an [in, in] sum
# that come with it, small enough that the last, partly filled tile of each expert wastes little.
TILE = 256


@pytree.register(leaves=("sums", "counts"), static=())
@dataclasses.dataclass(frozen=True)
class Hessians:
    """XᵀX of each expert over the tokens seen so far, and their number."""

    sums: Float[Array, "expert in in"]
    counts: Int32[Array, "expert"]


def empty_hessians(num_experts: int, width: int) -> Hessians:
    """Return the Hessians of no tokens: zeros, 4 * num_experts * width**2 bytes."""
    return Hessians(jnp.zeros((num_experts, width, width), jnp.float32), jnp.zeros(num_experts, jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def add_tokens(
    hessians: Hessians,
    x: Float[AnyArray, "token in"],
    expert_index: Int[AnyArray, "token"],
) -> Hessians:
    """Add the tokens of a batch to the sums of their experts.

    However uneven the routing, each token is multiplied once: the tokens are sorted by expert and taken in
    tiles, each of one expert. Beside the sums, which are updated in place (**the argument is donated**: use
    the returned Hessians), it takes `TILE * in` floats of tokens and one [in, in] product.

    Args:
        hessians: the sums so far.
        x: inputs of the layer, any float type; products and sums are float32 at full precision.
        expert_index: the expert of each token. Tokens of experts outside 0 .. expert - 1 are ignored, so a
            group of experts can be given all tokens with its first expert's number subtracted.
    """
    num_experts = hessians.counts.shape[0]
    if x.shape[0] == 0:
        return hessians
    tile = min(TILE, x.shape[0])
    known = (expert_index >= 0) & (expert_index < num_experts)
    expert = jnp.where(known, expert_index, num_experts)
    by_expert = jnp.argsort(expert)
    counts = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    first_token = jnp.cumsum(counts, dtype=jnp.int32) - counts
    tiles = -(-counts // tile)
    end_tile = jnp.cumsum(tiles, dtype=jnp.int32)

    def add_tile(i: Int[Array, ""], sums: Float[Array, "expert in in"]) -> Float[Array, "expert in in"]:
        e = jnp.searchsorted(end_tile, i, side="right")
        offset = (i - end_tile[e] + tiles[e]) * tile + jnp.arange(tile, dtype=jnp.int32)
        tokens = x[by_expert[first_token[e] + offset]].astype(jnp.float32)
        tokens = jnp.where((offset < counts[e])[:, None], tokens, 0.0)
        product = jnp.dot(tokens.T, tokens, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_index_in_dim(sums, sums[e] + product, e, axis=0)

    sums = lax.fori_loop(0, end_tile[-1], add_tile, hessians.sums)
    return Hessians(sums, hessians.counts + counts)
