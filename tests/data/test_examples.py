"""Samples: what a model can run, and padding at their end."""

import dataclasses

import numpy as np
import pytest

from qmoe_jax.config import PRESETS
from qmoe_jax.data import checked_examples

CONFIG = dataclasses.replace(PRESETS["switch-base-8"], vocab_size=10, pad_id=3, eos_id=4, decoder_start_id=5)


def example(encoder, decoder):
    return np.array(encoder, np.int32), np.array(decoder, np.int32)


@pytest.mark.parametrize(
    ("encoder", "kept"), [([7, 3, 4, 3, 3], [7, 3, 4]), ([3, 3], [3]), ([0, 4, 0], [0, 4, 0]), ([4], [4])]
)
def test_padding_at_the_encoders_end_is_cut_off_and_nothing_else(encoder, kept):
    (found,) = checked_examples([example(encoder, [5, 3])], CONFIG)
    assert (found.encoder.tolist(), found.decoder.tolist()) == (kept, [5, 3])


def test_an_end_token_that_is_padding_too_stays():
    config = dataclasses.replace(CONFIG, pad_id=4)
    (found,) = checked_examples([example([7, 4, 4, 4], [5])], config)
    assert found.encoder.tolist() == [7, 4]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [5]), "example 0, encoder: expected at least 1 ids, found 0"),
        (([10], [5]), "example 0, encoder: expected ids of 0 to 9, found 10 to 10"),
        (([4], [0, 1]), r"example 0, decoder: .* \(decoder_start_token_id 5\), found 0"),
    ],
)
def test_samples_that_a_model_cannot_run_are_named(pair, message):
    with pytest.raises(ValueError, match=message):
        checked_examples([example(*pair)], CONFIG)
