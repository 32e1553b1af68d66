"""Encoding and decoding: one contract for every codebook and implementation, and upstream's own streams."""

import functools
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.samples import random_digits
from qmoe_jax.coding import (
    CorruptStream,
    EncodedRows,
    decode,
    encode,
    entropy_bits,
    tunstall_codebook,
    upstream_codebook,
)

# A row for each codebook: upstream's pairs, one byte and more a code, dense digits, short and long codewords.
CODEBOOKS = {
    "upstream": upstream_codebook,
    "tunstall-8": tunstall_codebook,
    "tunstall-12": functools.partial(tunstall_codebook, code_bits=12),
    "tunstall-8-dense": functools.partial(tunstall_codebook, 0.34),
    "tunstall-2": functools.partial(tunstall_codebook, code_bits=2),
    "tunstall-8-sparse": functools.partial(tunstall_codebook, 0.99),
}
BACKENDS = ["cpu", "reference"]

every_codebook = pytest.mark.parametrize("make", CODEBOOKS.values(), ids=CODEBOOKS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

# Few shapes: the op is compiled for each.
matrices = st.tuples(
    st.sampled_from([1, 2, 7, 20]),
    st.sampled_from([1, 2, 31, 150]),
    st.sampled_from([0.0, 0.3, 0.885, 0.99, 1.0]),
    st.integers(0, 2**32),
)


@every_codebook
@settings(deadline=None, max_examples=40)
@given(matrix=matrices)
def test_decoding_undoes_encoding(make, matrix):
    codebook, digits = make(), random_digits(matrix[:2], *matrix[2:])
    encoded = encode(digits, codebook)
    assert encoded.codes.dtype == codebook.code_dtype
    assert encoded.row_offsets.dtype == np.int32
    for backend in BACKENDS:
        assert (decode(encoded, codebook, digits.shape[1], backend=backend) == digits).all()


@every_codebook
@pytest.mark.parametrize("shape", [(1, 1), (9, 37), (3, 200)], ids=str)
def test_both_implementations_write_the_same_bytes(make, shape):
    digits = random_digits(shape, 0.8, seed=0)
    walked, vectorized = (encode(digits, make(), backend=backend) for backend in BACKENDS)
    assert walked.codes.tobytes() == vectorized.codes.tobytes()
    assert (walked.row_offsets == vectorized.row_offsets).all()


@every_codebook
def test_rows_are_coded_one_by_one(make):
    """So a row's codewords do not depend on its neighbours, nor on how many rows a thread walks at once."""
    digits, codebook = random_digits((11, 60), 0.8, seed=1), make()
    together = encode(digits, codebook)
    alone = [encode(row[None], codebook).codes for row in digits]
    assert (np.concatenate(alone) == together.codes).all()


def cases(folder) -> dict:
    return json.loads((folder / "pack_meta.json").read_text())["cases"]


@every_backend
def test_streams_are_upstreams(backend, data):
    codebook = upstream_codebook()
    with np.load(data / "pack_vectors.npz") as vectors:
        for case in cases(data) if backend == "cpu" else ["iid50_64x1024", "w31_32x31", "w1_32x1"]:
            digits, codes, offsets = (vectors[f"{case}.{name}"] for name in ("tern", "w_comp", "row_off"))
            rows = len(digits) // 32 * 32  # upstream leaves out the rows past a multiple of 32
            encoded = encode(digits[:rows], codebook, backend=backend)
            assert (encoded.codes == codes).all(), case
            assert (encoded.row_offsets == offsets[: rows + 1]).all(), case
            assert (decode(encoded, codebook, digits.shape[1], backend=backend) == digits[:rows]).all(), case


@pytest.mark.parametrize("shape", ["768x3072", "2080x6144"])
def test_published_layers_have_upstreams_digests(shape, data):
    layer = json.loads((data / "pack_meta.json").read_text())["big_layers"][shape]
    other = (1 - 0.885) / 2
    generator = np.random.RandomState(layer["seed"])
    size = tuple(map(int, shape.split("x")))
    digits = generator.choice(3, size=size, p=[0.885, other, 1 - 0.885 - other]).astype(np.uint8)
    assert hashlib.sha256(digits.tobytes()).hexdigest() == layer["tern_sha256_uint8"]
    encoded = encode(digits, upstream_codebook())
    assert hashlib.sha256(encoded.codes.tobytes()).hexdigest() == layer["w_comp_sha256"]
    assert hashlib.sha256(encoded.row_offsets.tobytes()).hexdigest() == layer["row_off_sha256"]


@pytest.mark.parametrize("p_zero, most", [(0.8, 0.98), (0.885, 0.71), (0.95, 0.40)])
def test_fitted_byte_codewords_come_near_the_entropy(p_zero, most):
    digits = random_digits((64, 4096), p_zero, seed=2)
    frequencies = np.bincount(digits.reshape(-1), minlength=3) / digits.size
    rate = 8 * len(encode(digits, tunstall_codebook(float(frequencies[0]))).codes) / digits.size
    assert entropy_bits(frequencies) < rate < most


def test_the_entropy_of_known_frequencies():
    assert entropy_bits(np.array([0.5, 0.25, 0.25])) == 1.5
    assert entropy_bits(np.array([1.0, 0, 0])) == 0


@pytest.mark.parametrize(
    "digits, message",
    [
        (np.array([[0, 1], [2, 3]], np.uint8), "row 1, column 1: expected a digit 0, 1 or 2, found 3"),
        (np.zeros((3, 0), np.uint8), r"at least one row and column of digits, found \(3, 0\)"),
    ],
)
def test_digits_that_are_not_ternary_are_refused(digits, message):
    with pytest.raises(ValueError, match=message):
        encode(digits, tunstall_codebook())


# Each: what happens to a stream of 3 rows of 70 digits, and what the error says.
DAMAGE = {
    "row offsets: expected from 0 to the": lambda codes, offsets: (codes[:-1], offsets),
    r"row 1: begins at codeword \d+ and ends at 0": lambda codes, offsets: (codes, offsets * [1, 1, 0, 1]),
    r"row 0, codeword 2: expected a code below 255, found 255": lambda codes, offsets: (
        np.where(np.arange(len(codes)) == 2, 255, codes),
        offsets,
    ),
    r"row 2, codeword \d+: the row ends after \d+ of 70 digits": lambda codes, offsets: (
        codes[:-1],
        np.subtract(offsets, [0, 0, 0, 1]),
    ),
    r"row 1, codeword \d+: the row already has its 70 digits": lambda codes, offsets: (
        np.insert(codes, offsets[2], 0),
        np.add(offsets, [0, 0, 1, 1]),
    ),
}


@every_backend
@pytest.mark.parametrize("message, damage", list(DAMAGE.items()), ids=list(DAMAGE))
def test_corrupt_streams_are_refused_by_row_and_position(backend, message, damage):
    codebook = tunstall_codebook()
    codes, offsets = damage(*encode(random_digits((3, 70), 0.8, seed=3), codebook))
    damaged = EncodedRows(codes.astype(np.uint8), offsets.astype(np.int32))
    with pytest.raises(CorruptStream, match=message):
        decode(damaged, codebook, 70, backend=backend)


@every_codebook
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), flips=st.integers(0, 4), cut=st.integers(-3, 3), moved=st.booleans())
def test_damage_raises_or_decodes_to_digits(make, seed, flips, cut, moved):
    """Flipped bits, cut or added codes, moved offsets: an error or digits of the right shape, no crash."""
    codebook, rng = make(), np.random.default_rng(seed)
    codes, offsets = encode(random_digits((4, 50), 0.7, seed), codebook)
    codes, offsets = codes.copy(), offsets.copy()
    for bit in rng.integers(0, 8 * codes.nbytes, flips):
        codes.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    codes = np.concatenate([codes, codes[:cut]]) if cut > 0 else codes[: len(codes) + cut]
    if moved:
        offsets[rng.integers(0, 5)] += rng.integers(-60, 60)
    for backend in BACKENDS:
        try:
            digits = decode(EncodedRows(codes, offsets), codebook, 50, backend=backend)
        except CorruptStream as refusal:
            assert str(refusal).startswith("row")
        else:
            assert digits.shape == (4, 50)
            assert digits.max() <= 2
