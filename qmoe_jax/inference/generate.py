"""Cached encoder-decoder generation: one compiled loop, stopped when every row has ended."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from qmoe_jax.inference.placement import failures_told
from qmoe_jax.inference.sampling import Sampling
from qmoe_jax.models import SwitchTransformer


class _State(NamedTuple):
    """The loop's carry: tokens written so far `[b, new]`, the last one `[b, 1]`, who has ended `[b]`, caches, key."""

    step: Array
    tokens: Array
    last: Array
    ended: Array
    cache: Any
    key: Array


@partial(jax.jit, static_argnames="model")
def read_prompt(
    model: SwitchTransformer, params: dict[str, Any], tokens: Int[Array, "b n"], mask: Bool[Array, "b n"]
) -> Float[Array, "b n embed"]:
    """The encoder's part of `generate`."""
    return model.apply({"params": params}, tokens, mask, method="encode")


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def write_tokens(
    model: SwitchTransformer,
    params: dict[str, Any],
    encoded: Float[Array, "b n embed"],
    mask: Bool[Array, "b n"],
    key: Array,
    max_new_tokens: int,
    sampling: Sampling,
) -> Int[Array, "b new"]:
    """The decoder's part of `generate`."""
    config, rows = model.config, encoded.shape[0]

    def advance(state: _State) -> _State:
        logits, changed = model.apply(
            {"params": params, **state.cache}, state.last, encoded, mask, state.step, max_new_tokens,
            method="decode_step", mutable=["cache"],
        )  # fmt: skip
        key, use = jax.random.split(state.key)
        chosen = jnp.where(state.ended, config.pad_id, sampling.choose(logits[:, 0], use))
        written = lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.step, 1)
        ended = state.ended | (chosen == config.eos_id)
        return _State(state.step + 1, written, chosen[:, None], ended, changed, key)

    # The first step makes the caches, so it stands before the loop.
    start = _State(
        jnp.int32(0),
        jnp.full((rows, max_new_tokens), config.pad_id, jnp.int32),
        jnp.full((rows, 1), config.decoder_start_id, jnp.int32),
        jnp.zeros(rows, bool),
        {},
        key,
    )
    going = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.ended)
    return lax.while_loop(going, advance, advance(start)).tokens


def generate(
    model: SwitchTransformer,
    params: dict[str, Any],
    encoder_input_tokens: Int[Array, "b n"],
    *,
    max_new_tokens: int = 16,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    encoder_mask: Bool[Array, "b n"] | None = None,
) -> Int[Array, "b new"]:
    """Write `max_new_tokens` tokens for every row, greedily unless `sampling` says otherwise.

    Args:
      model: its experts dense or packed, wherever they live; for cached steps nothing may be dropped (`capacity` None).
      params: its parameters.
      encoder_input_tokens: int, padded with 0.
      max_new_tokens: at least 1.
      sampling: temperature, top-k, top-p.
      seed: of the sampling.
      encoder_mask: False on padding; by default where the id is 0.

    Returns:
      int32 `[b, max_new_tokens]`: the start token left out, 0 after the end token.

    Raises:
      CheckpointError: experts on disk that were needed cannot be read.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    mask = tokens != model.config.pad_id if encoder_mask is None else jnp.asarray(encoder_mask)
    with failures_told(params):
        encoded = read_prompt(model, params, tokens, mask)
        key = jax.random.key(seed)
        return write_tokens(model, params, encoded, mask, key, max_new_tokens, sampling).block_until_ready()
