"""NaN and infinity are found where they lie, in every dtype; a cast that makes them is refused."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.finite import CHUNK, cast, first_not_finite, require_finite

DTYPES = [
    "float16",
    "float32",
    "float64",
    ">f2",
    ">f4",
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_number_that_is_not_finite_is_found_by_its_index(dtype):
    array = np.zeros((2, 3, 4), dtype)
    array[0] = ml_dtypes.finfo(np.dtype(dtype).newbyteorder("=")).max
    assert first_not_finite(array) is None
    array[1, 2, 0] = array[1, 2, 3] = np.nan
    assert first_not_finite(array) == (1, 2, 0)
    assert first_not_finite(array.T) == (0, 2, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_beyond_the_first_chunk_is_found(value):
    array = np.zeros(CHUNK + 8, np.float32)
    array[CHUNK + 5] = value
    assert first_not_finite(array) == (CHUNK + 5,)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "bool", ml_dtypes.int4])
def test_integers_are_finite(dtype):
    assert first_not_finite(np.ones(3, dtype)) is None


def test_empty_arrays_and_scalars_are_checked():
    assert first_not_finite(np.zeros((0, 3), np.float32)) is None
    assert first_not_finite(np.array(np.nan)) == ()


def test_the_error_names_parameter_expert_position_and_value():
    array = np.zeros((2, 3, 4), np.float32)
    array[1, 2, 3] = -np.inf
    with pytest.raises(CheckpointError, match="not finite") as raised:
        require_finite(array, path="model", key="encoder/wi", first=6)
    assert raised.value.key == "encoder/wi, expert 7, element [2, 3]"
    assert raised.value.found == "-inf, float32"


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [(3.4e38, "float32", ml_dtypes.bfloat16), (7e4, "float32", "float16"), (1e300, "float64", "float32")],
)
def test_a_cast_that_overflows_is_refused(value, stored, dtype):
    with pytest.raises(CheckpointError, match="beyond the range") as raised:
        cast(np.array([0, value], stored), dtype, path="model", key="wi")
    assert raised.value.key == "wi, element [1]"


def test_a_cast_copies_what_was_not_finite_before():
    found = cast(np.array([1, np.nan, np.inf], np.float32), "float16", path="model", key="wi")
    np.testing.assert_array_equal(found, np.array([1, np.nan, np.inf], np.float16))
