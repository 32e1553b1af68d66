"""Loss of a model on held-out examples."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.data import Examples, batches, checked_examples
from qmoe_jax.distributed import mesh_of, split_rows
from qmoe_jax.inference.overflow import describe_overflow
from qmoe_jax.inference.placement import raise_store_errors
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.progress import ProgressCallback, Tally, no_progress
from qmoe_jax.settings import own_settings


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`, over the decoder tokens after each example's first.

    Attributes:
        loss: mean cross-entropy per token, in nats.
        perplexity: `exp(loss)`.
        accuracy: share of tokens that the model finds most likely.
        tokens: number of these tokens.
        per_example: float64 `[example]`, mean cross-entropy over an example's own tokens.
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
    encoder_mask: Bool[Array, "row n"],
    lengths: Int[Array, "row"],
) -> tuple[Float[Array, "row"], Int[Array, "row"]]:
    """Return each row's summed cross-entropy and number of correct tokens.

    The first `lengths - 1` predictions of a row count.
    """
    logits = model.apply({"params": params}, encoder, decoder, encoder_mask)[:, :-1]
    targets = decoder[:, 1:]
    real = jnp.arange(targets.shape[1], dtype=jnp.int32)[None] < lengths[:, None] - 1
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    correct = (jnp.argmax(logits, axis=-1) == targets) & real
    return jnp.sum(jnp.where(real, losses, 0.0), axis=1), jnp.sum(correct, axis=1)


@own_settings()
def evaluate(
    model: SwitchTransformer,
    params: dict[str, Any],
    examples: Examples,
    *,
    batch_size: int = 16,
    progress: ProgressCallback = no_progress,
) -> Evaluation:
    """Evaluate a model on held-out examples; all batches have one shape, so the step compiles once.

    Parameters on a mesh of devices split each batch over them, filled up to as many rows for each.

    Args:
        model: the module.
        params: its parameters.
        examples: (encoder ids, decoder ids beginning with the model's start token), both 1-D int32. Padding
            at the encoder's end does not count.
        batch_size: examples that run through the model together.
        progress: called with the number of examples done.

    Raises:
        ValueError: examples are missing, one has no token to predict, an id is outside the vocabulary, or a
            decoder begins with another token; or a loss is not finite: it names the part of the model in
            which numbers first are not.
        CheckpointError: experts on disk that were needed cannot be read.
    """
    examples = checked_examples(examples, model.config, min_decoder=2)
    sums, correct = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    tally, mesh = Tally(progress, len(examples)), mesh_of(params)
    for batch in batches(examples, min(batch_size, len(examples)), model.config.pad_id):
        part = slice(batch.start, min(batch.start + len(batch.lengths), len(examples)))
        with raise_store_errors(params):
            inputs = split_rows(mesh, batch.encoder, batch.decoder, batch.encoder_mask, batch.lengths)
            losses, hits = map(np.asarray, score(model, params, *inputs))
            if not np.isfinite(losses).all():
                raise ValueError(
                    describe_overflow(
                        model, params, batch.encoder, batch.decoder, jnp.asarray(batch.encoder_mask)
                    )
                )
        sums[part], correct[part] = losses[: part.stop - part.start], hits[: part.stop - part.start]
        tally.advance(part.stop - part.start)
    tokens = np.array([len(decoder) - 1 for _, decoder in examples])
    loss = float(sums.sum() / tokens.sum())
    accuracy = float(correct.sum() / tokens.sum())
    return Evaluation(loss, math.exp(min(loss, 700.0)), accuracy, int(tokens.sum()), sums / tokens)
