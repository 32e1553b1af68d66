"""Samples of span-corrupted text, as calibration, training and evaluation take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


class Example(NamedTuple):
    """One sample: encoder ids, and decoder ids that begin with the start token 0."""

    encoder: Int32[np.ndarray, "n"]
    decoder: Int32[np.ndarray, "m"]


Examples = Sequence[tuple[np.ndarray, np.ndarray]]
"""Samples; a plain pair of arrays stands for an `Example`."""


def check_examples(examples: Examples, vocab_size: int, *, min_decoder: int = 1) -> None:
    """Check that every sample can run through a model.

    Args:
        examples: the samples.
        vocab_size: number of ids of the model.
        min_decoder: decoder ids that a sample must have; 2 where one is to be predicted.

    Raises:
        ValueError: samples are missing, one has too few ids, or an id is outside the vocabulary.
    """
    if not examples:
        raise ValueError("no examples: expected at least one pair of encoder and decoder ids")
    for number, (encoder, decoder) in enumerate(examples):
        for name, ids, least in (("encoder", encoder, 1), ("decoder", decoder, min_decoder)):
            if len(ids) < least:
                raise ValueError(f"example {number}, {name}: expected at least {least} ids, found {len(ids)}")
            if np.min(ids) < 0 or np.max(ids) >= vocab_size:
                raise ValueError(
                    f"example {number}, {name}: expected ids of 0 to {vocab_size - 1}, found "
                    f"{np.min(ids)} to {np.max(ids)}; is the tokenizer this model's?"
                )
