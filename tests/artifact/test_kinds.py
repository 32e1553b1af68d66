"""Kinds of packing: digits and levels survive to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qmoe_jax.artifact import (
    CheckpointError,
    Kind,
    Ternary,
    Uniform,
    dequantize,
    num_groups,
    pack_matrix,
    pack_quantized,
)
from qmoe_jax.artifact.bits import pack_bits, packed_bytes, smallest_dtype, unpack_bits
from qmoe_jax.artifact.kinds import (
    LEVEL_DTYPES,
    kind_from_json,
    kind_to_json,
)
from qmoe_jax.artifact.matrices import unpack_digits
from qmoe_jax.coding import CorruptStream
from qmoe_jax.quantization.quantized import Quantized
from tests.helpers import artifact_samples as samples

SHAPES = [(1, 1), (3, 17), (36, 20)]
every_kind = pytest.mark.parametrize("kind", samples.KINDS.values(), ids=samples.KINDS)


def weights_of(kind: Kind, digits: np.ndarray, levels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The definition, weight by weight, with levels rounded as they are stored."""
    weights = np.empty(digits.shape, np.float32)
    for (row, column), digit in np.ndenumerate(digits):
        first, second = levels[row, group[column]]
        if isinstance(kind, Ternary):
            weights[row, column] = (0, *levels[row, group[column]].astype(LEVEL_DTYPES[kind.level_dtype]))[
                digit
            ]
        else:
            scale = np.float32(first.astype(LEVEL_DTYPES[kind.level_dtype]))
            weights[row, column] = (np.float32(digit) - second) * scale
    return weights


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reordered", [False, True], ids=["", "reordered"])
def test_dequantized_weights_are_the_values_of_the_digits(
    kind: Kind, shape: tuple[int, int], reordered: bool
) -> None:
    rng, groups = np.random.default_rng(3), num_groups(kind, shape[1])
    digits, levels = samples.random_digits(kind, shape, rng), samples.random_levels(kind, shape, rng)
    group = (
        rng.integers(0, groups, shape[1])
        if reordered
        else np.arange(shape[1]) // (kind.group_size or shape[1])
    )
    packed = pack_matrix(kind, digits, levels, samples.CODEBOOKS, group_index=group if reordered else None)
    np.testing.assert_array_equal(unpack_digits(packed, samples.CODEBOOKS), digits)
    expected = weights_of(kind, digits, levels, group)
    np.testing.assert_array_equal(dequantize(packed, samples.CODEBOOKS), expected)


@every_kind
def test_a_kind_of_packing_survives_json(kind: Kind) -> None:
    assert kind_from_json(kind_to_json(kind), "somewhere") == kind


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "vector"}, "vector"),
        ({"lattice": "E8"}, "lattice"),
        ({"level_dtype": "float8"}, "float8"),
        ({"input_scaled": True}, "input_scaled"),
    ],
)
def test_an_unknown_kind_is_refused_by_name(change: dict, named: str) -> None:
    fields = kind_to_json(samples.KINDS["ternary"]) | change
    with pytest.raises(CheckpointError, match=named) as caught:
        kind_from_json(fields, "manifest.json")
    assert "newer version" in str(caught.value)


def test_quantized_experts_keep_their_own_group_of_each_column() -> None:
    """Each expert keeps its own order of the columns; one whose groups follow the columns stores none."""
    kind, rng, shape = samples.KINDS["ternary, groups"], np.random.default_rng(5), (6, 20)
    digits = np.stack([samples.random_digits(kind, shape, rng) for _ in range(2)])
    levels = np.stack([samples.random_levels(kind, shape, rng) for _ in range(2)])
    groups = np.stack([np.arange(20) // 8, rng.permutation(np.arange(20) // 8)]).astype(np.int32)
    values = np.stack([weights_of(kind, *each) for each in zip(digits, levels, groups, strict=True)])
    error, fallback = jnp.zeros(2), jnp.zeros(2, bool)
    quantized = Quantized(*map(jnp.asarray, (values, digits, levels)), error, fallback, jnp.asarray(groups))
    packed = pack_quantized(kind, quantized, samples.CODEBOOKS)
    assert ["column_group" in matrix.parts for matrix in packed] == [False, True]
    for matrix, expected in zip(packed, values, strict=True):
        np.testing.assert_array_equal(dequantize(matrix, samples.CODEBOOKS), expected)


def test_packing_refuses_levels_of_another_shape() -> None:
    digits = np.zeros((4, 20), np.uint8)
    with pytest.raises(ValueError, match=r"expected levels \(4, 3, 2\), found \(4, 1, 2\)"):
        pack_matrix(
            samples.KINDS["ternary, groups"], digits, np.ones((4, 1, 2), np.float32), samples.CODEBOOKS
        )


def test_packing_refuses_a_zero_point_that_is_not_an_integer() -> None:
    levels = np.full((4, 1, 2), 0.5, np.float32)
    with pytest.raises(ValueError, match="integers"):
        pack_matrix(Uniform(2), np.zeros((4, 20), np.uint8), levels, {})


def test_packing_refuses_a_digit_with_too_many_bits() -> None:
    with pytest.raises(ValueError, match="expected numbers of 2 bits, found 4"):
        pack_bits(np.full((1, 3), 4, np.uint8), 2)


def test_unpacking_refuses_codeword_counts_that_do_not_fill_a_row() -> None:
    packed = samples.random_matrix(samples.KINDS["ternary"], (6, 40), np.random.default_rng(0))
    packed.parts["counts"][2] -= 1
    packed.parts["counts"][3] += 1
    with pytest.raises(CorruptStream, match="row 2"):
        unpack_digits(packed, samples.CODEBOOKS)


@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 3), count=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_numbers_survive_bit_packing(data: st.DataObject, bits: int, rows: int, count: int) -> None:
    numbers = data.draw(arrays.arrays(np.uint8, (rows, count), elements=st.integers(0, 2**bits - 1)))
    packed = pack_bits(numbers, bits)
    assert packed.shape == (rows, packed_bytes(count, bits))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), numbers)


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [([0, 255], "uint8"), ([0, 256], "uint16"), ([65536], "uint32"), ([-1, 4], "int16"), ([-40000], "int32")],
)
def test_smallest_dtype_holds_all_integers(numbers: list[int], dtype: str) -> None:
    assert smallest_dtype(np.array(numbers)) == dtype
