"""Batches of examples."""

import numpy as np
import pytest

from qmoe_jax.data import batches
from qmoe_jax.data.batching import pad_rows


def test_batches_have_one_shape_and_hold_every_example():
    generator = np.random.default_rng(0)
    examples = [
        (generator.integers(1, 9, n).astype(np.int32), generator.integers(1, 9, m).astype(np.int32))
        for n, m in [(3, 2), (17, 5), (4, 9), (8, 2), (1, 3)]
    ]
    rows = list(batches(examples, 2, 10))
    assert {(b.encoder.shape, b.decoder.shape) for b in rows} == {((2, 32), (2, 16))}
    for number, (encoder, decoder) in enumerate(examples):
        batch = rows[number // 2]
        assert batch.start == 2 * (number // 2)
        np.testing.assert_array_equal(batch.encoder[number % 2, : len(encoder)], encoder)
        np.testing.assert_array_equal(batch.decoder[number % 2, : batch.lengths[number % 2]], decoder)
        np.testing.assert_array_equal(
            batch.encoder_mask[number % 2], np.arange(32) < len(encoder), "by length, not by id"
        )
        assert (batch.encoder[number % 2, len(encoder) :] == 10).all()
    assert rows[-1].lengths[1] == 0
    assert not rows[-1].encoder_mask[1].any()


def test_a_row_longer_than_the_batch_is_named():
    with pytest.raises(ValueError, match="example 1: expected at most 4 tokens, found 5"):
        pad_rows([np.ones(4, np.int32), np.ones(5, np.int32)], 2, 4, 0)
