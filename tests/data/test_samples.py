"""Samples from text files: which texts are taken, and what is refused."""

import itertools
import json
import os

import numpy as np
import pytest

from qmoe_jax.data import TextError, read_documents, samples, segments, short_texts, span_corruption
from qmoe_jax.data.samples import spread


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
    pieces = list(segments([document], tokenizer, 16))
    np.testing.assert_array_equal(np.concatenate(pieces), tokens[: sum(map(len, pieces))])
    assert all(len(piece) == 16 for piece in pieces[:-1])
    assert len(short_texts([document, "the cat"], tokenizer, limit=16)) == 1


def test_samples_are_the_first_short_documents(tokenizer, texts):
    kept = short_texts(read_documents(texts), tokenizer, 60, 3)
    expected = span_corruption(kept, tokenizer.sentinels, tokenizer.token_ids, seed=5)
    assert_equal(samples(texts, tokenizer, 3, max_tokens=60, seed=5), expected)
    assert len(expected) == 3


def test_samples_with_segment_are_spread_over_all_documents(tokenizer, texts):
    cut = list(segments(read_documents(texts, "test"), tokenizer, 16))
    found = samples([texts], tokenizer, 4, segment=16, split="test")
    assert len(cut) > 2 * len(found)
    assert_equal(found, span_corruption(spread(cut, 4), tokenizer.sentinels, tokenizer.token_ids))


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (7, 4, [0, 2, 4, 6]),  # every second
        (8, 4, [0, 2, 4, 6]),
        (5, 3, [0, 2, 4]),
        (5, 4, [0, 2, 3, 4]),
        (4, 4, [0, 1, 2, 3]),
        (3, 4, [0, 1, 2]),
        (3, None, [0, 1, 2]),
        (0, 4, []),
    ],
)
def test_spread_takes_as_many_as_asked_at_even_distances(length, count, expected):
    assert spread(range(length), count) == expected


@pytest.mark.parametrize("length", [12, 13, 100, 1000])
def test_spread_over_a_long_stream_is_exact_and_nearly_even(length):
    found = spread(iter(range(length)), 3)
    assert len(found) == 3 and found[0] == 0
    assert all(length / 6 <= b - a <= length / 1.5 for a, b in itertools.pairwise([*found, length]))


@pytest.mark.parametrize("options", [{"max_tokens": 1000}, {"segment": 16}, {"segment": 7}])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_there_are_as_many_samples_as_asked_for(tokenizer, texts, options, count):
    assert len(samples(texts, tokenizer, count, **options)) == count


def test_fewer_samples_than_asked_for_are_refused_by_their_number(tokenizer, texts):
    expected = (
        r"texts\.jsonl: fewer samples than asked for\n  expected: 13 of fewer than 1000 tokens\n"
        r"  found: 12 in 12 documents\n  remedy: .* or ask for at most 12 samples"
    )
    with pytest.raises(TextError, match=expected):
        samples(texts, tokenizer, 13, max_tokens=1000)


def test_at_most_takes_all_where_there_are_fewer(tokenizer, texts):
    assert len(samples(texts, tokenizer, at_most=13, max_tokens=1000)) == 12
    assert len(samples(texts, tokenizer, at_most=5, max_tokens=1000)) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0}, {"count": -1}, {"count": 1.0}, {"count": True}, {"at_most": 0}, {"segment": 0},
        {"segment": 1}, {"max_tokens": 0}, {"max_tokens": "8"},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named_before_a_file_is_read(tokenizer, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected an integer of at least"):
        samples("missing", tokenizer, **options)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 0.0, True, None])
def test_seeds_out_of_range_are_named_before_a_file_is_read(tokenizer, seed):
    with pytest.raises(ValueError, match=r"seed: expected an integer of 0 to 4294967295, found"):
        samples("missing", tokenizer, seed=seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(7), np.uint32(2**32 - 1)])
def test_seeds_in_range_are_taken(tokenizer, texts, seed):
    assert len(samples(texts, tokenizer, 2, seed=seed)) == 2


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


@pytest.mark.parametrize("options", [{"max_tokens": 8, "segment": 8}, {"count": 2, "at_most": 2}])
def test_options_that_exclude_each_other_are_refused(tokenizer, texts, options):
    with pytest.raises(ValueError, match="found both"):
        samples(texts, tokenizer, **options)


def test_one_pipe_named_twice_is_refused_before_it_is_read(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="is a pipe that is to be read twice"):
        samples([tmp_path / "pipe", tmp_path / "pipe"], tokenizer)


def test_samples_refuse_a_missing_file_before_reading_others(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text("not JSON")
    with pytest.raises(TextError, match="missing: no text found"):
        samples([tmp_path / "bad.jsonl", tmp_path / "missing"], tokenizer)
