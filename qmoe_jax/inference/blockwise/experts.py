"""Run tokens through a range of a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from pallas_kernels.matmul.epilogue import ACTIVATIONS
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.experts import grouped_mlp
from qmoe_jax.parameters import expert_matrices, split_matrices

CHUNK = 8192
"""Tokens per compiled step: 64 MB of float32 hidden activations at d_ff 2,048, 200 MB at c-2048's 6,144."""


def token_chunks(tokens: int) -> Iterator[tuple[slice, int]]:
    """Yield chunks of `tokens` and the padding of each to their common size, so that a step compiles once."""
    size = min(CHUNK, max(16, 1 << (tokens - 1).bit_length()))
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        yield part, size - (part.stop - start)


@partial(jax.jit, static_argnames="activation")
def _outputs(x: Array, expert: Array, wi: Sequence[Array], wo: Array, activation: str) -> Array:
    return grouped_mlp(x, expert, wi, wo, ACTIVATIONS[activation])


def run_experts(
    x: np.ndarray, expert: np.ndarray, weights: Mapping[str, ArrayLike], model: SwitchConfig
) -> np.ndarray:
    """Return each token's expert output, not scaled by the router probability.

    Args:
        x: normalized tokens `[token, d_model]`, in the dtype to compute in.
        expert: expert of each token `[token]`, counted from the first of the range.
        weights: the matrices of the range by name, `[expert, in, out]`.
        model: the architecture.

    Returns:
        `[token, d_model]`, in the dtype of `x`.
    """
    out = np.empty_like(x)
    wi, wo = split_matrices({name: jnp.asarray(weights[name]) for name in expert_matrices(model)})
    for part, pad in token_chunks(len(expert)):
        rows = np.pad(x[part], ((0, pad), (0, 0)))
        result: Any = _outputs(rows, np.pad(expert[part], (0, pad)), wi, wo, model.activation)
        out[part] = np.asarray(result)[: part.stop - part.start]
    return out
