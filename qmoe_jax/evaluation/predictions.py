"""Predictions of two models for the same tokens: losses, agreement and divergence of the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qmoe_jax.evaluation.tensors import Pair
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.blockwise.states import HiddenStates
from qmoe_jax.models.layers import Dense, Embedding
from qmoe_jax.parameters import EMBEDDING, LOGITS

TOKENS = 512
"""Tokens whose logits are computed at a time: 66 MB per model at T5's vocabulary."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Means over the decoder tokens after each example's first.

    Attributes:
        tokens: number of these tokens.
        losses: cross-entropy in nats, of the original and of the compressed model.
        agreement: share of tokens for which both find the same next token most likely.
        divergence: KL(original || compressed) of the distributions of the next token, in nats.
    """

    tokens: int
    losses: tuple[float, float]
    agreement: float
    divergence: float


def compare_predictions(
    pair: Pair, states: Sequence[HiddenStates], tokens: Sequence[np.ndarray], dtype: DTypeLike
) -> Predictions:
    """Compare the predictions of two models for each decoder token's successor.

    Args:
        pair: the models; an untied head is measured on the way.
        states: each decoder's states after its final norm.
        tokens: each example's decoder ids, at least 2.
        dtype: dtype of the computation.

    Raises:
        CheckpointError: a model's logits are not finite.
    """
    heads = _heads(pair, dtype)
    ends = np.cumsum([len(ids) for ids in tokens])
    where = np.delete(np.arange(ends[-1]), ends - 1)
    targets = np.concatenate([ids[1:] for ids in tokens])
    sums = np.zeros(4)
    for start in range(0, len(where), TOKENS):
        part = where[start : start + TOKENS]
        pad = TOKENS - len(part)
        x = [np.pad(mine.values[part], ((0, pad), (0, 0))).astype(np.dtype(dtype)) for mine in states]
        scores = _score(heads, x, np.pad(targets[start : start + TOKENS], (0, pad)), pair.config.tied)
        sums += [np.sum(np.asarray(score)[: len(part)], dtype=np.float64) for score in scores]
        for path, loss in zip(pair.paths, sums[:2], strict=True):
            if not np.isfinite(loss):
                raise CheckpointError(
                    f"the model's logits are not finite in {np.dtype(dtype)}",
                    path=path,
                    key=EMBEDDING if pair.config.tied else LOGITS,
                    expected="finite losses",
                    found=loss,
                    remedy="the weights of the head are too large: take another copy of the checkpoint",
                )
    original, compressed, agreement, divergence = (sums / len(where)).tolist()
    return Predictions(len(where), (original, compressed), agreement, divergence)


def _heads(pair: Pair, dtype: DTypeLike) -> tuple[Array, Array]:
    """Return each model's output projection: the embedding of tied models."""
    if pair.config.tied:
        return pair.read(EMBEDDING, dtype)
    original, compressed = pair.params([LOGITS], dtype)
    return original["decoder"]["logits_dense"]["kernel"], compressed["decoder"]["logits_dense"]["kernel"]


def _logits(head: Array, x: Float[Array, "token embed"], tied: bool) -> Float[Array, "token vocab"]:
    if tied:
        return Embedding(*head.shape, x.dtype).apply({"params": {"embedding": head}}, x, method="attend")
    kernel = Dense(head.shape[1], ("embed", "vocab"), x.dtype)
    return kernel.apply({"params": {"kernel": head}}, x).astype(jnp.float32)


@partial(jax.jit, static_argnames="tied")
def _score(
    heads: tuple[Array, Array],
    x: Sequence[Float[Array, "token embed"]],
    targets: Int[Array, "token"],
    tied: bool,
) -> tuple[Array, Array, Array, Array]:
    """Return both losses of each token, whether the most likely tokens agree, and the divergence."""
    a, b = (
        jax.nn.log_softmax(_logits(head, mine, tied), axis=-1) for head, mine in zip(heads, x, strict=True)
    )
    loss = lambda p: -jnp.take_along_axis(p, targets[:, None], -1)[:, 0]
    agree = jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)
    return loss(a), loss(b), agree, jnp.sum(jnp.exp(a) * (a - b), axis=-1)
