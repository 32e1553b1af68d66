"""`encode_rows`, one suite for every backend, against a greedy encoder with a dictionary of codewords."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from benchmarks.samples import random_digits
from pallas_kernels.encode_rows.pallas import encode_rows
from qmoe_jax.coding import Codebook
from tests.helpers import packed_samples as samples
from tests.helpers.bounds import checked_kernels, ran, strays, traced
from tests.helpers.kernel_contract import BACKENDS
from tests.helpers.lowering import kernels, lowered_for_cuda

# Every codebook on a shape that is not a multiple of anything, the first one also on a single digit.
CASES = {
    "tunstall-8-one": ("tunstall-8", (1, 1, 1)),
    **{name: (name, (3, 7, 131)) for name in samples.CODEBOOKS},
}

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_codebook = pytest.mark.parametrize("book", samples.CODEBOOKS)


@functools.cache
def words(codebook: Codebook) -> dict[bytes, int]:
    lengths = zip(codebook.digits, codebook.lengths, strict=True)
    return {digits[:length].tobytes(): code for code, (digits, length) in enumerate(lengths)}


def greedy(row: np.ndarray, codebook: Codebook) -> list[int]:
    """Take the longest codeword; where a row ends too early for any, the first that continues with zeros."""
    rest, code_of, codes = row.tobytes() + bytes(-len(row) % codebook.symbol_digits), words(codebook), []
    while rest:
        within = (rest[:end] for end in range(min(len(rest), codebook.max_length), 0, -1))
        beyond = (rest + bytes(zeros) for zeros in range(1, codebook.max_length))
        word = next(word for word in itertools.chain(within, beyond) if word in code_of)
        codes.append(code_of[word])
        rest = rest[len(word) :]
    return codes


def assert_encoded(found: pk.EncodedRows, digits: np.ndarray, codebook: Codebook) -> None:
    """The codes of every row, zeros behind the last."""
    assert found.codes.dtype == codebook.code_dtype
    for codes, offsets, matrix in zip(*map(np.asarray, found), digits, strict=True):
        rows = [greedy(row, codebook) for row in matrix]
        np.testing.assert_array_equal(np.diff(offsets), [len(row) for row in rows])
        flat = np.concatenate(rows)
        np.testing.assert_array_equal(codes, np.pad(flat, (0, len(codes) - len(flat))))


@every_backend
@pytest.mark.parametrize("book, shape", CASES.values(), ids=CASES)
def test_codes_are_those_of_a_greedy_encoder(backend, book, shape):
    codebook, digits = samples.CODEBOOKS[book](), random_digits(shape)
    assert_encoded(pk.encode_rows(digits, codebook.encode_table, backend=backend), digits, codebook)


@every_backend
@hypothesis.settings(deadline=None, max_examples=10, derandomize=True)
@hypothesis.given(
    p_zero=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**32),
    book=st.sampled_from(["tunstall-8", "upstream"]),
)
def test_codes_are_right_for_any_digits(backend, p_zero, seed, book):
    """Of one shape, which each backend compiles once."""
    codebook, digits = samples.CODEBOOKS[book](), random_digits((2, 33, 45), p_zero, seed)
    assert_encoded(pk.encode_rows(digits, codebook.encode_table, backend=backend), digits, codebook)


def test_encoded_rows_unpack_to_their_digits():
    codebook, digits = samples.CODEBOOKS["tunstall-8"](), random_digits((2, 9, 70))
    codes, row_offsets = pk.encode_rows(digits, codebook.encode_table)
    levels = np.broadcast_to(np.float32([1, 2]), (2, 9, 2))
    packed = pk.PackedMatrix(codes, row_offsets, levels, codebook.decode_table, 70)
    packed.validate()
    np.testing.assert_array_equal(pk.unpack(packed), digits)


@every_backend
def test_leading_axes_and_vmap_encode_each_matrix_by_itself(backend):
    codebook, digits = samples.CODEBOOKS["tunstall-8"](), random_digits((2, 3, 4, 11))
    run = functools.partial(pk.encode_rows, table=codebook.encode_table, backend=backend)
    stacked, mapped = run(digits), jax.jit(jax.vmap(run))(digits)
    assert stacked.codes.shape == (2, 3, 4 * 11)
    for layer in range(2):
        for expert in range(3):
            alone = run(digits[layer, expert])
            for found in (stacked, mapped):
                same = jax.tree.map(
                    lambda a, b, e=(layer, expert): (a[e] == b).all(), tuple(found), tuple(alone)
                )
                assert all(same)


@every_backend
@pytest.mark.parametrize("book", ["tunstall-8", "upstream"])
def test_bytes_above_two_count_as_two(backend, book):
    codebook = samples.CODEBOOKS[book]()
    noise = np.random.default_rng(0).integers(0, 256, (2, 5, 67), dtype=np.uint8)
    noise[0] = 255
    found = pk.encode_rows(noise, codebook.encode_table, backend=backend)
    assert_encoded(found, np.minimum(noise, 2), codebook)


@every_codebook
def test_encoding_lowers_to_two_triton_kernels(book):
    codebook = samples.CODEBOOKS[book]()
    program = lowered_for_cuda(encode_rows, random_digits((2, 96, 200)), codebook.encode_table)
    assert kernels(program) == 2
    assert 'name = "encode_rows_count"' in program
    assert 'name = "encode_rows_write"' in program


@pytest.mark.parametrize(
    "digits, message",
    [
        (np.zeros((2, 0), np.uint8), r"uint8 digits \[..., row, width\], found uint8 \(2, 0\)"),
        (np.zeros((2, 3), np.int32), "found int32"),
        (jax.ShapeDtypeStruct((1 << 20, 1 << 12), jnp.uint8), "may take 4294967296 codewords"),
    ],
)
def test_arrays_that_are_not_digits_and_too_many_codewords_are_refused(monkeypatch, digits, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as outside the tests
    table = samples.CODEBOOKS["tunstall-8"]().encode_table
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(pk.encode_rows, digits, table)


def test_digits_between_two_and_four_gib_are_refused():
    table = samples.CODEBOOKS["tunstall-8"]().encode_table
    digits = jax.ShapeDtypeStruct((3, 1 << 18, 1 << 12), jnp.uint8)
    with pytest.raises(NotImplementedError, match="digits of 3,221,225,472 bytes"):
        jax.eval_shape(encode_rows, digits, table)


@pytest.mark.parametrize("book", ["upstream", "tunstall-8"])
def test_no_byte_leads_the_kernel_out_of_an_array(book):
    table = samples.CODEBOOKS[book]().encode_table
    noise = np.random.default_rng(0).integers(0, 256, (2, 37, 19), dtype=np.uint8)
    traced.clear()
    with checked_kernels():
        codes, row_offsets = ran(jax.jit(lambda d: encode_rows(d, table, interpret=True)), noise)
    assert traced == {"load", "store"}
    assert strays == []
    assert codes.max() < len(table.code)
    assert row_offsets[:, -1].min() > 37
