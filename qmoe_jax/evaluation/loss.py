"""Loss of a model on held-out examples, jitted once for all batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from qmoe_jax.data.batching import batches
from qmoe_jax.inference.placement import raise_store_errors
from qmoe_jax.models import SwitchTransformer

Example = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`, over the decoder tokens after each example's first.

    Attributes:
      loss: mean cross-entropy a token, in nats, weighted by tokens.
      perplexity: `exp(loss)`.
      accuracy: share of tokens that the model finds most likely.
      tokens: how many tokens that is.
      per_example: float64 `[example]`: mean cross-entropy over an example's own tokens.
    """

    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    per_example: np.ndarray


@partial(jax.jit, static_argnames="model")
def score(
    model: SwitchTransformer,
    params: dict[str, Any],
    encoder: Int[Array, "row n"],
    decoder: Int[Array, "row m"],
    lengths: Int[Array, "row"],
) -> tuple[Float[Array, "row"], Int[Array, "row"]]:
    """Summed cross-entropy and number of correct tokens of each row, over its first `lengths - 1` predictions."""
    logits = model.apply({"params": params}, encoder, decoder)[:, :-1]
    targets = decoder[:, 1:]
    real = jnp.arange(targets.shape[1]) < lengths[:, None] - 1
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    correct = (jnp.argmax(logits, axis=-1) == targets) & real
    return jnp.sum(jnp.where(real, losses, 0.0), axis=1), jnp.sum(correct, axis=1)


def evaluate(
    model: SwitchTransformer,
    params: dict[str, Any],
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Evaluate on examples: (encoder ids, decoder ids beginning with the start token 0), both 1-D int32.

    All batches have one shape, so the step compiles once. `done` is told the number of examples finished.

    Raises:
      ValueError: there is no example, one without a token to predict, or an id beyond the vocabulary.
      CheckpointError: experts on disk that were needed cannot be read.
    """
    check_examples(examples, model.config.vocab_size)
    sums, correct = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    for batch in batches(examples, min(batch_size, len(examples))):
        part = slice(batch.start, min(batch.start + len(batch.lengths), len(examples)))
        with raise_store_errors(params):
            losses, hits = map(np.asarray, score(model, params, batch.encoder, batch.decoder, batch.lengths))
        sums[part], correct[part] = losses[: part.stop - part.start], hits[: part.stop - part.start]
        done(part.stop)
    tokens = np.array([len(decoder) - 1 for _, decoder in examples])
    loss = float(sums.sum() / tokens.sum())
    accuracy = float(correct.sum() / tokens.sum())
    return Evaluation(loss, math.exp(min(loss, 700.0)), accuracy, int(tokens.sum()), sums / tokens)


def check_examples(examples: Sequence[Example], vocab_size: int) -> None:
    """Refuse what cannot be evaluated.

    Raises:
      ValueError: there is no example, one without a token to predict, or an id beyond the vocabulary.
    """
    if not examples:
        raise ValueError("no examples to evaluate")
    for number, (encoder, decoder) in enumerate(examples):
        if len(encoder) == 0 or len(decoder) < 2:
            raise ValueError(f"example {number}: expected encoder ids and at least 2 decoder ids")
        ids = np.concatenate([encoder, decoder])
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"example {number}: expected ids of 0 to {vocab_size - 1}, found {ids.min()} to {ids.max()}; "
                "is the tokenizer this model's?"
            )
