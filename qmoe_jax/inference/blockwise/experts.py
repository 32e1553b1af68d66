"""A range of a layer's experts over the tokens routed to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.typing import ArrayLike

from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.experts import ACTIVATIONS, grouped_mlp
from qmoe_jax.parameters import expert_matrices, split_matrices

CHUNK = 8192
"""Tokens that go through a range of experts at a time."""


def token_chunks(tokens: int) -> Iterator[tuple[slice, int]]:
    """Parts of `tokens`, and how many rows each lacks to their common size, so that a step compiles once."""
    size = min(CHUNK, max(16, 1 << (tokens - 1).bit_length()))
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        yield part, size - (part.stop - start)


@partial(jax.jit, static_argnames="activation")
def _outputs(x: Array, expert: Array, wide: Sequence[Array], narrow: Array, activation: str) -> Array:
    return grouped_mlp(x, expert, wide, narrow, ACTIVATIONS[activation])


def run_experts(
    x: np.ndarray, expert: np.ndarray, weights: Mapping[str, ArrayLike], model: SwitchConfig
) -> np.ndarray:
    """Each token through its own expert, without the router's probability.

    Args:
      x: `[token, d_model]`, normed, in the dtype to compute in.
      expert: `[token]`, counted from the range's first.
      weights: the matrices of the range by name, `[expert, in, out]` as T5X has them.
      model: the architecture.

    Returns:
      `[token, d_model]`, of x's dtype.
    """
    out = np.empty_like(x)
    wide, narrow = split_matrices({name: jnp.asarray(weights[name]) for name in expert_matrices(model)})
    for part, pad in token_chunks(len(expert)):
        rows = np.pad(x[part], ((0, pad), (0, 0)))
        result: Any = _outputs(rows, np.pad(expert[part], (0, pad)), wide, narrow, model.activation)
        out[part] = np.asarray(result)[: part.stop - part.start]
    return out
