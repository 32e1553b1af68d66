"""Samples of span-corrupted text, as calibration, training and evaluation take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from qmoe_jax.config import SwitchConfig, TokenIds


class Example(NamedTuple):
    """One sample: encoder ids, and decoder ids that begin with the model's start token."""

    encoder: Int32[np.ndarray, "n"]
    decoder: Int32[np.ndarray, "m"]


Examples = Sequence[tuple[np.ndarray, np.ndarray]]
"""Samples; a plain pair of arrays stands for an `Example`."""


def checked_examples(examples: Examples, config: SwitchConfig, *, min_decoder: int = 1) -> list[Example]:
    """Return the samples without padding at the encoder's end, after a check that a model can run them.

    Args:
        examples: the samples.
        config: the model's architecture.
        min_decoder: decoder ids that a sample must have; 2 where one is to be predicted.

    Raises:
        ValueError: samples are missing, one has too few ids, an id is outside the vocabulary, or a decoder
            begins with another token than the model's.
    """
    if not examples:
        raise ValueError("no examples: expected at least one pair of encoder and decoder ids")
    last, start = config.vocab_size - 1, config.decoder_start_id
    for number, (encoder, decoder) in enumerate(examples):
        for name, ids, least in (("encoder", encoder, 1), ("decoder", decoder, min_decoder)):
            if len(ids) < least:
                raise ValueError(f"example {number}, {name}: expected at least {least} ids, found {len(ids)}")
            if np.min(ids) < 0 or np.max(ids) > last:
                raise ValueError(
                    f"example {number}, {name}: expected ids of 0 to {last}, found "
                    f"{np.min(ids)} to {np.max(ids)}; is the tokenizer this model's?"
                )
        if decoder[0] != start:
            raise ValueError(
                f"example {number}, decoder: expected the model's start token first "
                f"(decoder_start_token_id {start}), found {decoder[0]}; make samples with the tokenizer that "
                "load_tokenizer returns for this model"
            )
    return [Example(without_padding(encoder, config.token_ids), decoder) for encoder, decoder in examples]


def without_padding(ids: np.ndarray, tokens: TokenIds) -> np.ndarray:
    """Return the ids before the padding at their end, at least one; elsewhere their id is text."""
    real = np.flatnonzero(np.asarray(ids) != tokens.pad)
    end = int(real[-1]) + 1 if real.size else 1
    return np.asarray(ids)[: end + (tokens.pad == tokens.eos)]
