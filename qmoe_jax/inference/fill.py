"""Fills the blanks of texts: what T5's pretraining teaches a model to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from qmoe_jax.data.batching import pad_rows, round_up, row_mask
from qmoe_jax.data.infill import Infill, read_spans
from qmoe_jax.data.seed import SEEDS, check_seed
from qmoe_jax.data.tokenizer import Tokenizer
from qmoe_jax.inference.generate import generate, written_lengths
from qmoe_jax.inference.sampling import Sampling
from qmoe_jax.models import SwitchTransformer
from qmoe_jax.progress import ProgressCallback, no_progress

LENGTH_MULTIPLE = 16
"""Texts are padded to a multiple of this many tokens, so that similar lengths share one compiled program."""


@dataclasses.dataclass(frozen=True)
class FilledText:
    """A text with its blanks filled.

    Attributes:
        text: the text; a blank for which the model wrote nothing stays as it was.
        spans: words written for each sentinel, by its number.
        tokens: tokens written, sentinels and end token included.
    """

    text: str
    spans: Mapping[int, str]
    tokens: int


def fill_blanks(
    model: SwitchTransformer,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 8,
    progress: ProgressCallback = no_progress,
) -> list[FilledText]:
    """Fill the blanks of texts, written `___` or `<extra_id_0>`.

    Args:
        model: as `load_model` or `load_compressed` returns it.
        params: its parameters.
        tokenizer: its tokenizer.
        texts: each with one blank or more; around its blanks a text stays as it is, byte for byte.
        max_new_tokens: tokens to write at most, for all blanks of a text.
        sampling: temperature, top-k, top-p; greedy by default.
        seed: seed of the sampling; batch i uses `seed + i`, so that equal texts in two batches differ.
        batch_size: texts that run together. All batches have one shape, so the model compiles once.
        progress: called with the texts filled.

    Raises:
        ValueError: a text is not a string of Unicode characters or has no blank, a blank has a number that
            the tokenizer has no sentinel for, the tokenizer is not the model's (`TextError`), or the seed is
            out of range.
        CheckpointError: experts on disk cannot be read.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts: expected a sequence of texts, found one text, {texts[:60]!r}")
    seed = check_seed(seed)
    tokenizer.check_model(model.config)
    infills = [Infill.parse(text) for text in texts]
    rows = [infill.encode(tokenizer) for infill in infills]
    filled: list[FilledText] = []
    progress(0, len(texts), "")
    for number, (batch, mask) in enumerate(_batches(rows, batch_size, model.config.pad_id)):
        written = generate(
            model, params, jnp.asarray(batch), max_new_tokens=max_new_tokens, sampling=sampling,
            seed=(seed + number) % SEEDS, encoder_mask=jnp.asarray(mask),
        )  # fmt: skip
        lengths = written_lengths(np.asarray(written), model.config.eos_id).tolist()
        for infill, ids, length in zip(infills[len(filled) :], np.asarray(written), lengths, strict=False):
            spans = read_spans(ids, tokenizer)
            words = {sentinel: tokenizer.decode(span) for sentinel, span in spans.items()}
            filled.append(FilledText(infill.fill(spans, tokenizer), words, length))
        progress(len(filled), len(texts), "")
    return filled


def _batches(
    rows: Sequence[np.ndarray], batch_size: int, pad_id: int
) -> Iterator[tuple[Int32[np.ndarray, "row n"], Bool[np.ndarray, "row n"]]]:
    """Yield encoder ids in batches of one shape, and their masks.

    The last row is repeated to fill the last batch.
    """
    if not rows:
        return
    size = min(batch_size, len(rows))
    length = round_up(max(map(len, rows)), LENGTH_MULTIPLE)
    for start in range(0, len(rows), size):
        part = list(rows[start : start + size])
        part += part[-1:] * (size - len(part))
        yield pad_rows(part, size, length, pad_id), row_mask(part, size, length)
