"""Texts with blanks: encoding them, and filling them with spans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.data import Tokenizer
from qmoe_jax.data.infill import Infill, read_spans


def spans_of(tokenizer: Tokenizer, **words: str) -> dict[int, list[int]]:
    return {int(name.removeprefix("s")): tokenizer.encode(text).tolist() for name, text in words.items()}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("the ___ sat", (0,)),
        ("<extra_id_3> sat on <extra_id_1>", (3, 1)),
        ("___ sat on <extra_id_0> and _____", (1, 0, 2)),
        ("<extra_id_0> and <extra_id_0>", (0, 0)),
    ],
)
def test_blanks_are_numbered(text, numbers):
    assert Infill.parse(text).numbers == numbers


def test_a_text_without_a_blank_is_refused():
    with pytest.raises(ValueError, match="no blank in 'the cat__sat'"):
        Infill.parse("the cat__sat")


def test_a_text_with_a_blank_is_encoded_as_span_corruption_encodes_it(tokenizer):
    # In training whole texts are tokenized and then cut: only the first piece of a word begins with a space.
    before, whole = tokenizer.encode("the cat").tolist(), tokenizer.encode("the cat sat, on").tolist()
    after_comma = whole[len(tokenizer.encode("the cat sat").tolist()) :]
    ids = Infill.parse("the cat ___, on").encode(tokenizer)
    assert ids.dtype == np.int32
    assert ids.tolist() == [*before, tokenizer.sentinels.id(0), *after_comma, 1]


def test_a_space_after_a_blank_begins_a_word(tokenizer):
    ids = Infill.parse("<extra_id_5> cat").encode(tokenizer).tolist()
    assert ids == [tokenizer.sentinels.id(5), *tokenizer.encode("cat").tolist(), 1]


def test_a_blank_without_a_sentinel_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"<extra_id_100>: expected a number of 0 to 99"):
        Infill.parse("the <extra_id_100>").encode(tokenizer)


def test_generated_ids_are_cut_at_their_sentinels(tokenizer):
    sentinel = tokenizer.sentinels.id
    ids = [0, 7, sentinel(0), 8, 9, sentinel(2), sentinel(1), 10, 0, sentinel(0), 11, 1, 12]
    ids.insert(4, tokenizer.vocab_size)  # an id that only padding of the vocabulary has
    assert read_spans(ids, tokenizer) == {0: [8, 9], 2: [], 1: [10]}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("the ___ sat", "the cat sat"),
        ("the___sat", "the catsat"),
        ("___, a dog", "cat, a dog"),
        ("  we\n___\nsaw", "  we\ncat\nsaw"),
        ("the ___ and ___", "the cat and ___"),
    ],
)
def test_words_replace_blanks(tokenizer, text, filled):
    assert Infill.parse(text).fill(spans_of(tokenizer, s0="cat"), tokenizer) == filled


def test_a_span_within_a_word_needs_no_space_and_takes_none(tokenizer):
    comma = tokenizer.model.piece_to_id(",")
    assert comma != tokenizer.model.unk_id()
    assert Infill.parse("the cat___ sat").fill({0: [comma]}, tokenizer) == "the cat, sat"
    assert Infill.parse("the cat ___ sat").fill({0: [comma]}, tokenizer) == "the cat , sat"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["the", "cat", "___", "<extra_id_4>", ",", " ", "\n", "dog"]), max_size=12))
def test_text_and_blanks_survive_encoding_and_filling(tokenizer, parts):
    text = "".join([*parts, "___"])
    infill = Infill.parse(text)
    assert infill.fill({}, tokenizer) == text
    assert int((infill.encode(tokenizer) >= tokenizer.sentinels.start).sum()) == len(infill.numbers)
