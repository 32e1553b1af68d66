"""Samples from text files: which texts are taken, and what is refused."""

import json

import numpy as np
import pytest

from qmoe_jax.data import TextError, read_documents, samples, segments, short_texts, span_corruption


@pytest.fixture
def texts(tmp_path):
    """Twelve documents of growing length in two splits."""
    path = tmp_path / "texts.jsonl"
    lines = [
        {"text": "the cat sat on the mat " * (n + 1), "split": ("train", "test")[n % 2]} for n in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.encoder, b.encoder)
        np.testing.assert_array_equal(a.decoder, b.decoder)


def test_segments_cut_a_document_and_short_texts_skips_it(tokenizer):
    document = "the cat sat on the mat " * 10
    tokens = tokenizer.encode(document)
    pieces = segments([document], tokenizer, 16)
    np.testing.assert_array_equal(np.concatenate(pieces), tokens[: sum(map(len, pieces))])
    assert all(len(piece) == 16 for piece in pieces[:-1])
    assert len(short_texts([document, "the cat"], tokenizer, limit=16)) == 1


def test_samples_are_the_first_short_documents(tokenizer, texts):
    kept = short_texts(read_documents(texts), tokenizer, 60, 3)
    expected = span_corruption(kept, tokenizer.sentinels, tokenizer.token_ids, seed=5)
    assert_equal(samples(texts, tokenizer, 3, max_tokens=60, seed=5), expected)
    assert len(expected) == 3


def test_samples_with_segment_are_spread_over_all_documents(tokenizer, texts):
    cut = segments(read_documents(texts, "test"), tokenizer, 16)
    found = samples([texts], tokenizer, 4, segment=16, split="test")
    assert_equal(found, span_corruption(cut[:: -(-len(cut) // 4)], tokenizer.sentinels, tokenizer.token_ids))
    assert len(cut) > 2 * len(found)


def test_samples_read_several_files_in_order(tokenizer, texts):
    twice = samples([texts, str(texts)], tokenizer)
    assert len(twice) == 2 * len(samples(texts, tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, "no text of fewer than 3 tokens"),
        ({"segment": 1000}, "no text of at least 500 tokens, half a segment"),
        ({"split": "dev"}, 'no text with "split": "dev"'),
    ],
)
def test_samples_without_text_name_the_rule(tokenizer, texts, options, message):
    with pytest.raises(TextError, match=message):
        samples(texts, tokenizer, **options)


def test_samples_either_skip_or_cut_long_texts(tokenizer, texts):
    with pytest.raises(ValueError, match="found both"):
        samples(texts, tokenizer, max_tokens=8, segment=8)


def test_samples_refuse_a_missing_file_before_reading_others(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text("not JSON")
    with pytest.raises(TextError, match="missing: no text found"):
        samples([tmp_path / "bad.jsonl", tmp_path / "missing"], tokenizer)
