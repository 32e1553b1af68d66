"""Comparison of a compressed model with its original, on the same text in one pass."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.artifact.report import to_json
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.data import Examples, check_examples
from qmoe_jax.evaluation.predictions import compare_predictions
from qmoe_jax.evaluation.side_by_side import LayerComparison, SideBySide
from qmoe_jax.evaluation.tensors import Pair
from qmoe_jax.progress import ProgressCallback, no_progress
from qmoe_jax.settings import own_settings


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Figures of predictions are over the decoder tokens after each example's first.

    Attributes:
        original_loss: mean cross-entropy per token of the original, in nats, as `evaluate` computes it.
        compressed_loss: that of the compressed model.
        next_token_agreement: share of tokens for which both find the same next token most likely.
        kl_divergence: mean KL(original || compressed) of the distributions of the next token, in nats.
        tokens: number of these tokens.
        examples: number of examples that they come from.
        layers: distance of the hidden states after each layer, the encoder's layers first.
        weight_errors: ‖Q - W‖ / ‖W‖ of every tensor by its T5X path, W the original's: 0 where they are
            equal, infinite where only W is zero.
        notes: decisions that were needed to compare the two.
    """

    original_loss: float
    compressed_loss: float
    next_token_agreement: float
    kl_divergence: float
    tokens: int
    examples: int
    layers: tuple[LayerComparison, ...]
    weight_errors: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values: null for an infinite error."""
        return to_json(dataclasses.asdict(self))


@own_settings()
def compare(
    original: str | os.PathLike[str] | Checkpoint,
    compressed: str | os.PathLike[str] | Checkpoint,
    examples: Examples,
    *,
    dtype: DTypeLike = "float32",
    experts_per_read: int = 16,
    scratch: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = no_progress,
) -> Comparison:
    """Compare two models of one architecture, in any two formats, tensor by tensor and on the same text.

    Both run side by side, layer after layer, each on its own hidden states; every tensor is read once,
    measured and used. No token is dropped at full experts, and padding (id 0 in the encoder) does not count.

    Memory: of each model the hidden states of all tokens, twice; one layer without its experts, or
    `experts_per_read` of them in float32; at the end the embedding or head, and 512 tokens' logits.

    Args:
        original: a checkpoint of any format, by path or opened.
        compressed: likewise; a compressed one is dequantized range by range.
        examples: held-out samples, (encoder ids, decoder ids beginning with the start token 0), 1-D int32.
        dtype: dtype of the computation, as in `load_model`; weights are measured as they are stored.
        experts_per_read: experts of a layer in memory together.
        scratch: folder for hidden states beyond an eighth of the machine's memory, and for experts whose
            stored chunks span more than `experts_per_read` (13.4 GB per matrix for c-2048); the system's
            temporary folder by default.
        progress: called with the number of experts done; a dense layer counts as one.

    Raises:
        CheckpointError: one cannot be read, or a tensor is in one only or has another shape: it names the
            tensor.
        ValueError: the examples do not fit the model.
    """
    if experts_per_read < 1:
        raise ValueError(f"experts_per_read: expected 1 or more, found {experts_per_read}")
    pair = Pair(_opened(original), _opened(compressed))
    check_examples(examples, pair.config.vocab_size, min_decoder=2)
    folder = Path(scratch) if scratch is not None else Path(tempfile.gettempdir())
    layers, states = SideBySide(pair, examples, dtype, experts_per_read, folder).run(progress)
    predictions = compare_predictions(pair, states, [decoder for _, decoder in examples], dtype)
    return Comparison(
        *predictions.losses,
        predictions.agreement,
        predictions.divergence,
        predictions.tokens,
        len(examples),
        tuple(layers),
        pair.errors(),
        tuple(pair.notes),
    )


def _opened(model: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)
