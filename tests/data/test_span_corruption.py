"""Span corruption against the masks and samples of the original program."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.config import TokenIds
from qmoe_jax.data import Sentinels
from qmoe_jax.data.span_corruption import corrupt, noise_mask, span_corruption

T5 = Sentinels.above(32000)
IDS = TokenIds()


def test_noise_masks_equal_upstreams(data):
    golden = np.load(data / "span_masks.npz")
    masks = [name for name in golden.files if name.startswith("mask_")]
    assert len(masks) >= 70
    for name in masks:
        length, seed = (int(part[1:]) for part in name.split("_")[1:])
        np.testing.assert_array_equal(noise_mask(length, np.random.RandomState(seed)), golden[name], name)


def test_a_sequence_of_noise_masks_equals_upstreams(data):
    golden = np.load(data / "span_masks.npz")
    names = sorted(
        (n for n in golden.files if n.startswith("seq_")), key=lambda name: int(name.split("_")[2])
    )
    generator = np.random.RandomState(7)
    for name in names:
        length = int(name.split("_L")[1])
        np.testing.assert_array_equal(noise_mask(length, generator), golden[name], name)


def test_noise_masks_of_another_density_and_span_equal_upstreams(data):
    golden = np.load(data / "span_masks.npz")["density25_span5_L200_s3"]
    mask = noise_mask(200, np.random.RandomState(3), density=0.25, mean_span=5.0)
    np.testing.assert_array_equal(mask, golden)


@pytest.mark.parametrize("split", ["train", "val"])
def test_span_corrupted_samples_equal_upstreams(data, split):
    golden = json.loads((data / "data_mlm.json").read_text())
    count = golden["trainsamples"]
    short = [np.array(d) for d in golden[f"{split}_docs_without_eos"] if len(d) + 1 <= golden["inputlen"]]
    part = slice(0, count) if split == "train" else slice(count, None)
    examples = span_corruption(short[: len(golden["encoder"][part])], T5, IDS)
    assert [e.encoder.tolist() for e in examples] == golden["encoder"][part]
    assert [e.decoder.tolist() for e in examples] == golden["decoder"][part]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300), st.integers(0, 2**31 - 1))
def test_encoder_and_decoder_ids_hold_every_token_once(length, seed):
    tokens = np.random.RandomState(seed).randint(2, 100, length)
    mask = noise_mask(length, np.random.RandomState(seed))
    example = corrupt(tokens, mask, T5, IDS)
    text: list[int] = []
    spans = {int(e): int(i) for i, e in enumerate(example.decoder) if e >= T5.start}
    for token in example.encoder[:-1]:
        if token < T5.start:
            text.append(int(token))
            continue
        at = spans[int(token)] + 1
        while example.decoder[at] < T5.start:
            text.append(int(example.decoder[at]))
            at += 1
    assert text == tokens.tolist()


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        noise_mask(1, np.random.RandomState(0))


def test_more_noise_spans_than_sentinels_are_refused():
    mask = np.tile([False, True], 10)
    with pytest.raises(
        ValueError, match="10 noise spans: expected at least 11 sentinels in the tokenizer, found 5"
    ):
        corrupt(np.arange(20), mask, Sentinels.above(95, 5), IDS)


def test_samples_are_made_with_the_models_token_ids_and_the_sentinels_own():
    mask = np.array([False, True, True, False, True])
    example = corrupt(np.arange(20, 25), mask, Sentinels((7, 3, 9)), TokenIds(4, 2, 5))
    assert example.encoder.tolist() == [20, 7, 23, 3, 2]
    assert example.decoder.tolist() == [5, 7, 21, 22, 3, 24, 9]
