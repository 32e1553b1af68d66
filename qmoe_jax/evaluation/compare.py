"""How far a compressed model is from its original, on the same text in one pass."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from qmoe_jax.artifact.open import open_checkpoint
from qmoe_jax.checkpoints.reader import DenseReader
from qmoe_jax.evaluation.loss import Example, check_examples
from qmoe_jax.evaluation.predictions import compare_predictions
from qmoe_jax.evaluation.side_by_side import LayerComparison, SideBySide
from qmoe_jax.evaluation.tensors import Pair
from qmoe_jax.inference.blockwise.progress import Silent, Watcher
from qmoe_jax.parameters import STACKS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Figures of predictions are over the decoder tokens after each example's first.

    Attributes:
      original_loss: mean cross-entropy a token of the original, in nats, as `evaluate` has it.
      compressed_loss: that of the compressed model.
      next_token_agreement: share of tokens where both find the same next token most likely.
      kl_divergence: mean KL(original || compressed) of the next token's distributions, in nats.
      tokens: how many tokens that is.
      examples: how many examples they come from.
      layers: how far the hidden states are apart after each layer, the encoder's first.
      weight_errors: ‖Q - W‖ / ‖W‖ of every tensor by its T5X path, W the original's: 0 where they are equal,
        infinite where W alone is zero.
      notes: what had to be decided to compare the two.
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
        """As plain values."""
        return dataclasses.asdict(self)


def compare(
    original: str | os.PathLike[str] | DenseReader,
    compressed: str | os.PathLike[str] | DenseReader,
    examples: Sequence[Example],
    *,
    dtype: DTypeLike = "float32",
    experts_per_read: int = 16,
    scratch: str | os.PathLike[str] | None = None,
    progress: Watcher | None = None,
) -> Comparison:
    """Compare two models of one architecture, in any two formats, tensor by tensor and on the same text.

    Both run side by side, layer after layer, each on its own hidden states; every tensor is read once, measured
    and used. Nothing is dropped at full experts, and padding (id 0 in the encoder) does not count.

    Args:
      original: a checkpoint of any format, by path or opened.
      compressed: likewise; a compressed one is dequantized range by range.
      examples: held-out samples, (encoder ids, decoder ids beginning with the start token 0), 1-D int32.
      dtype: of the computation, as in `load_model`; weights are measured as they are stored.
      experts_per_read: experts of a layer in memory together.
      scratch: folder for hidden states beyond an eighth of the machine's memory, and for experts whose stored
        chunks span more than `experts_per_read` (13.4 GB a matrix for c-2048); by default the system's.
      progress: told how far it has come; `ProgressBar("comparing")` draws it.

    Memory: of each model the hidden states of all tokens, twice; one layer without its experts, or
    `experts_per_read` of them in float32; at the end the embedding or head, and 512 tokens' logits.

    Raises:
      CheckpointError: one cannot be read, or a tensor is in one only or has another shape: it names the tensor.
      ValueError: the examples do not fit the model.
    """
    if experts_per_read < 1:
        raise ValueError(f"experts_per_read: expected 1 or more, found {experts_per_read}")
    pair = Pair(_opened(original), _opened(compressed))
    check_examples(examples, pair.config.vocab_size)
    watcher, config = progress or Silent(), pair.config
    folder = Path(scratch) if scratch is not None else Path(tempfile.gettempdir())
    sparse = sum(len(config.sparse_layers(stack)) for stack in STACKS)
    watcher.begin(sum(map(config.num_layers, STACKS)), sparse * config.num_experts)
    try:
        walk = SideBySide(pair, examples, dtype, experts_per_read, folder, watcher)
        layers, states = walk.run()
        predictions = compare_predictions(pair, states, [decoder for _, decoder in examples], dtype)
    finally:
        watcher.end()
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


def _opened(model: str | os.PathLike[str] | DenseReader) -> DenseReader:
    return model if isinstance(model, DenseReader) else open_checkpoint(model)
