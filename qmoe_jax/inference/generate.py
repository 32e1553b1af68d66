"""Encoder-decoder generation with key-value caches: one compiled loop that stops when every row has ended."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.data.seed import check_seed
from qmoe_jax.distributed import mesh_of, split_rows
from qmoe_jax.inference.overflow import describe_overflow
from qmoe_jax.inference.placement import raise_store_errors
from qmoe_jax.inference.sampling import Sampling
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.settings import own_settings

NOT_FINITE = -1
"""The token that stands where logits are not finite."""


class _State(NamedTuple):
    """Loop carry: tokens so far `[b, new]`, last token `[b, 1]`, finished rows `[b]`, caches, random key."""

    step: Array
    tokens: Array
    last: Array
    ended: Array
    cache: Any
    key: Array


@partial(jax.jit, static_argnames="model")
def encode_prompt(
    model: SwitchTransformer, params: dict[str, Any], tokens: Int[Array, "b n"], mask: Bool[Array, "b n"]
) -> Float[Array, "b n embed"]:
    """Return the encoder output."""
    return model.apply({"params": params}, tokens, mask, method="encode")


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def decode_tokens(
    model: SwitchTransformer,
    params: dict[str, Any],
    encoded: Float[Array, "b n embed"],
    mask: Bool[Array, "b n"],
    key: Array,
    max_new_tokens: int,
    sampling: Sampling,
) -> Int[Array, "b new"]:
    """Return the decoder's tokens, int32, given the encoder output; `NOT_FINITE` where logits are not."""
    config, rows = model.config, encoded.shape[0]

    def advance(state: _State) -> _State:
        logits, changed = model.apply(
            {"params": params, **state.cache}, state.last, encoded, mask, state.step, max_new_tokens,
            method="decode_step", mutable=["cache"],
        )  # fmt: skip
        key, use = jax.random.split(state.key)
        finite = jnp.isfinite(logits[:, 0]).all(axis=-1)
        chosen = jnp.where(finite, sampling.choose(logits[:, 0], use), NOT_FINITE)
        chosen = jnp.where(state.ended, config.pad_id, chosen)
        written = lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.step, 1)
        ended = state.ended | (chosen == config.eos_id) | (chosen == NOT_FINITE)
        return _State(state.step + 1, written, chosen[:, None], ended, changed, key)

    # The first step creates the caches, so it runs before the loop.
    start = _State(
        jnp.int32(0),
        jnp.full((rows, max_new_tokens), config.pad_id, jnp.int32),
        jnp.full((rows, 1), config.decoder_start_id, jnp.int32),
        jnp.zeros(rows, bool),
        {},
        key,
    )
    unfinished = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.ended)
    return lax.while_loop(unfinished, advance, advance(start)).tokens


@own_settings()
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
    """Generate up to `max_new_tokens` tokens for every row, greedily unless `sampling` says otherwise.

    Parameters on a mesh of devices split the rows over them; the last row is repeated where they do not
    divide evenly.

    Args:
        model: a model with `capacity` None (cached steps drop no tokens), its experts dense, packed or
            placed.
        params: the parameters of the model.
        encoder_input_tokens: token ids, padded with the padding id.
        max_new_tokens: number of tokens, at least 1.
        sampling: temperature, top-k and top-p.
        seed: seed of the sampling.
        encoder_mask: False on padding; by default where the id is the padding id.

    Returns:
        int32 `[b, max_new_tokens]`, without the start token, with the padding id after the end token.

    Raises:
        CheckpointError: an expert on disk cannot be read.
        ValueError: `max_new_tokens` is below 1, the seed is not one of 0 to 2³² - 1, or logits are not
            finite: it names the part of the model in which they first become so.
    """
    seed = check_seed(seed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    mask = tokens != model.config.pad_id if encoder_mask is None else jnp.asarray(encoder_mask)
    rows = len(tokens)
    tokens, mask = split_rows(mesh_of(params), tokens, mask)
    with raise_store_errors(params):
        encoded = encode_prompt(model, params, tokens, mask)
        key = jax.random.key(seed)
        written = decode_tokens(model, params, encoded, mask, key, max_new_tokens, sampling)
        if bool((written == NOT_FINITE).any()):
            start = jnp.full((len(tokens), 1), model.config.decoder_start_id, jnp.int32)
            told = jnp.concatenate([start, jnp.maximum(written, 0)], axis=1)
            raise ValueError(describe_overflow(model, params, tokens, told, mask))
        return written[:rows]


def written_lengths(tokens: Int[np.ndarray, "b new"], eos_id: int) -> Int[np.ndarray, "b"]:
    """Return how many tokens `generate` wrote into each row, end token included; the rest is padding."""
    ended = np.asarray(tokens) == eos_id
    return np.where(ended.any(1), ended.argmax(1) + 1, ended.shape[1])
