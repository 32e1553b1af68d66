"""Tables and packed matrices: the entries' fields, invariants, and what breaks them."""

import dataclasses

import jax
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import DecodeTable
from tests.helpers import packed_samples as samples


def table_of(words: list[np.ndarray]) -> DecodeTable:
    lengths = np.array([len(word) for word in words], np.int32)
    return DecodeTable.from_digits(
        lengths, np.stack([np.pad(word, (0, lengths.max() - len(word))) for word in words])
    )


def words_of(table: DecodeTable, count: int) -> list[list[int]]:
    """The codewords back from the entries."""
    words = []
    for entry in np.asarray(table.entries)[:count].astype(np.int64):
        digits = [0] * int(entry[0] & ((1 << table.field_bits) - 1))
        for word in entry:
            for slot in range(table.slots):
                field = int(word) >> table.field_bits + slot * (table.field_bits + 2)
                if digit := field >> table.field_bits & 3:
                    digits[field & (1 << table.field_bits) - 1] = digit
        words.append(digits)
    return words


@pytest.mark.parametrize("longest", [1, 2, 5, 31, 64, 300])
def test_entries_hold_the_codewords(longest):
    rng = np.random.default_rng(longest)
    words = [rng.integers(0, 3, rng.integers(1, longest, endpoint=True)).astype(np.uint8) for _ in range(50)]
    words.append(np.full(longest, 2, np.uint8))
    table = table_of(words)
    assert words_of(table, 51) == [word.tolist() for word in words]
    assert table.field_bits == longest.bit_length()
    assert table.field_bits + table.slots * (table.field_bits + 2) <= 32


@pytest.mark.parametrize("name, size", [("tunstall-8", (255, 1, 2)), ("upstream", (65536, 1, 3))])
def test_sizes_of_the_common_tables(name, size):
    table = samples.CODEBOOKS[name]().decode_table
    assert (*table.entries.shape, table.slots) == size


def test_codewords_too_long_for_an_entry_are_refused():
    with pytest.raises(
        ValueError, match="codewords of 32768 digits do not fit a 32-bit entry: at most 32767"
    ):
        table_of([np.ones(32768, np.uint8)])


@pytest.fixture
def packed():
    return samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 3, 40)).packed


def test_a_packed_matrix_is_a_pytree(packed):
    assert (packed.num_experts, packed.rows, packed.width) == (2, 3, 40)
    again = jax.tree.map(np.asarray, jax.tree.map(jax.numpy.asarray, packed))
    assert jax.tree.all(jax.tree.map(np.array_equal, packed, again))
    shapes = jax.tree.map(lambda array: array.shape, packed)  # anything may stand where the arrays were
    assert shapes.levels == (2, 3, 2)


def test_a_packed_matrix_has_a_shape_and_bytes(packed):
    assert packed.shape == (2, 3, 40)
    assert packed.nbytes == packed.codes.nbytes + 2 * 4 * 4 + 2 * 3 * 2 * 2


@pytest.mark.parametrize("index", [slice(1, 2), np.array([1, 0, 1])], ids=["slice", "array"])
@pytest.mark.parametrize("arrays", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_indexing_a_packed_matrix_selects_experts(packed, index, arrays):
    chosen = jax.tree.map(arrays, packed)[index]
    assert chosen.num_experts == len(np.arange(2)[index])
    np.testing.assert_array_equal(pk.unpack(chosen), np.asarray(pk.unpack(packed))[index])


def test_a_packed_matrix_is_not_iterable(packed):
    with pytest.raises(TypeError, match="not iterable"):
        iter(packed)


def broken(packed, **arrays):
    copies = {name: np.array(getattr(packed, name)) for name in arrays}
    for name, (index, value) in arrays.items():
        copies[name][index] = value
    return dataclasses.replace(packed, **copies)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": ((1, 0), 255)}, "expert 1, row 0: expected codes below 255, found 255"),
        ({"row_offsets": ((0, 1), 0)}, "expert 0, row 0: expected one codeword or more, found 0"),
        (
            {"row_offsets": ((1, 3), 10**6)},
            "expert 1, row offsets: expected 0 to at most .*, found 0 to 1000000",
        ),
    ],
)
def test_broken_invariants_are_named(packed, change, message):
    packed.validate()
    with pytest.raises(ValueError, match=message):
        broken(packed, **change).validate()


def test_rows_that_codewords_do_not_fill_are_named(packed):
    wider = dataclasses.replace(packed, width=200)
    with pytest.raises(ValueError, match=r"expert 0, row 0: expected 200 columns, found \d+"):
        wider.validate()


def test_levels_of_another_dtype_are_refused(packed):
    half = dataclasses.replace(packed, levels=np.asarray(packed.levels, np.float16))
    with pytest.raises(ValueError, match="levels: expected bfloat16 or float32, found float16"):
        half.validate()
    assert isinstance(half, pk.PackedMatrix)
