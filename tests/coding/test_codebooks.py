"""Codebooks: upstream's dictionary bit for bit, Tunstall's properties, the invariants, storage."""

import hashlib
import json

import numpy as np
import pytest

from qmoe_jax.coding import Codebook, tunstall_codebook, upstream_codebook
from qmoe_jax.coding.upstream import pair_probabilities


@pytest.fixture(scope="module")
def facts(data):
    return json.loads((data / "codebook_facts.json").read_text())


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<i4").tobytes()).hexdigest()


def test_upstream_dictionary_is_the_originals(facts):
    """Its table has two words per entry: the number of pairs in the low nibble, then four bits per pair."""
    codebook = upstream_codebook()
    shift = 4 + 2 * np.arange(14)
    words = codebook.digits.reshape(-1, 2, 14).astype(np.int64) << shift
    assert sha256(words.sum(2) | (codebook.lengths // 2)[:, None]) == facts["dec_sha256"]


def test_upstream_trie_is_the_originals(facts):
    """Its rows are codes, and the root comes last."""
    trie = upstream_codebook().trie
    row_of_node = np.where(np.arange(len(trie.code)) == 0, 1 << 16, trie.code)
    rows = np.full((len(trie.code), 9), -1)
    rows[row_of_node] = np.where(trie.child >= 0, row_of_node[trie.child], -1)
    assert sha256(rows) == facts["trie_sha256"]


def test_upstream_probabilities_and_lengths_are_the_originals(facts):
    assert [repr(p) for p in pair_probabilities()] == facts["pair_probs"]
    lengths, counts = np.unique(upstream_codebook().lengths // 2, return_counts=True)
    assert dict(zip(map(str, lengths), counts, strict=True)) == facts["count_by_len_pairs"]


CODEBOOKS = [
    (0.885, 8, 64),
    (0.885, 8, 4),
    (0.34, 10, 64),
    (0.995, 12, 64),
    (0.01, 7, 64),
    (0.5, 2, 1),
    (0.9, 16, 20),
]


@pytest.mark.parametrize("p_zero, code_bits, max_length", CODEBOOKS)
def test_tunstall_is_the_leaves_of_a_complete_tree(p_zero, code_bits, max_length):
    codebook = tunstall_codebook(p_zero, code_bits, max_length)
    codebook.validate()
    assert codebook.size <= 2**code_bits
    assert codebook.max_length <= max_length
    assert (3.0**-codebook.lengths).sum() == pytest.approx(
        1
    )  # Kraft's equality: complete and free of prefixes
    inner = codebook.trie.code < 0
    assert (codebook.trie.child[inner] >= 0).all()
    assert (codebook.trie.child[~inner] < 0).all()


def test_tunstall_codes_are_in_the_order_of_probability():
    codebook = tunstall_codebook(0.885)
    zeros = codebook.lengths - (codebook.digits != 0).sum(1)
    probability = 0.885**zeros * 0.0575 ** (codebook.lengths - zeros)
    assert codebook.code_dtype == np.uint8
    assert (np.diff(probability) <= 1e-12).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"p_zero": 1.0}, "p_zero: expected a probability between 0 and 1, found 1.0"),
        ({"code_bits": 17}, "code_bits: expected 2 to 16, found 17"),
        ({"max_length": 0}, "max_length: expected at least 1, found 0"),
    ],
)
def test_tunstall_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tunstall_codebook(**arguments)


@pytest.mark.parametrize("codebook", [tunstall_codebook(), upstream_codebook()], ids=lambda c: c.name)
def test_a_codebook_of_stored_arrays_is_the_same(codebook):
    names = ("lengths", "digits", "symbol_digits")
    again = Codebook.from_arrays("again", {name: np.copy(getattr(codebook, name)) for name in names})
    assert again == codebook
    assert hash(again) == hash(codebook)
    assert again != tunstall_codebook(0.9)


def test_the_digest_of_a_codebook_is_stable():
    """Artifacts hold it: a change of this value is a change of the format."""
    assert tunstall_codebook(0.885).digest.startswith("de3c8fb97279adb9")


BROKEN = {
    "another codeword has the same digits": ([1, 1, 1], [[0], [1], [1]]),
    "after trie node 0 some digits match no codeword": ([1, 1], [[0], [1]]),
    "after trie node 3 some digits match no codeword": ([1, 1, 2], [[0, 0], [1, 0], [2, 2]]),
    "codeword 1: length 3, expected a multiple of 1 up to 2": ([1, 3, 1], [[0, 0], [1, 0], [2, 0]]),
    "codeword 2: expected digits 0, 1, 2, and 0 beyond its length": ([1, 1, 1], [[0, 0], [1, 0], [2, 1]]),
}


@pytest.mark.parametrize("message, arrays", [(m, a) for m, a in BROKEN.items()], ids=list(BROKEN))
def test_arrays_that_are_not_a_codebook_are_refused(message, arrays):
    lengths, digits = arrays
    arrays = {"lengths": np.array(lengths), "digits": np.array(digits), "symbol_digits": np.array(1)}
    with pytest.raises(ValueError, match=message):
        Codebook.from_arrays("broken", arrays)
