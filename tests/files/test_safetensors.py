"""The safetensors codec beside the format's own package."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.safetensors import open_safetensors, read_header, render_header, write_safetensors
from qmoe_jax.files.tensor import read_all

ARRAYS = {
    "z": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(3, dtype=np.int16),
    "scalar": np.array(7, np.uint8),
    "empty": np.zeros((0, 4), np.float64),
    "b": np.ones((2, 2), ml_dtypes.bfloat16),
}


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", list(ARRAYS.items()), ARRAYS.values())
    stored = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert stored.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (stored[name].dtype, stored[name].shape) == (array.dtype, array.shape)
        assert stored[name].tobytes() == array.tobytes()


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / "x.safetensors")
    tensors = open_safetensors(tmp_path / "x.safetensors")
    for name, array in ARRAYS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert read_all(tensors[name]).tobytes() == array.tobytes()
    np.testing.assert_array_equal(tensors["z"].read(slice(1, 2)), ARRAYS["z"][1:2])


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bit_floats_are_read_back(dtype: type, tmp_path: Path) -> None:
    array = np.arange(8).astype(dtype)
    write_safetensors(tmp_path / "x.safetensors", [("x", array)], [array])
    assert read_all(open_safetensors(tmp_path / "x.safetensors")["x"]).tobytes() == array.tobytes()


@pytest.mark.parametrize("alignment", [8, 16])
def test_a_header_keeps_the_order_and_aligns_the_data(alignment: int, tmp_path: Path) -> None:
    data = render_header(list(ARRAYS.items()), {"who": "me"}, alignment=alignment)
    assert len(data) % alignment == 0
    (tmp_path / "x").write_bytes(data + b"".join(array.tobytes() for array in ARRAYS.values()))
    header = read_header(tmp_path / "x")
    assert (header.metadata, header.data_begin) == ({"who": "me"}, len(data))
    nonempty = [name for name in ARRAYS if name != "empty"]
    assert [entry.name for entry in header.tensors if entry.name != "empty"] == nonempty


def test_an_array_that_differs_from_its_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"key: z\n  expected: float32 \[2, 3\]\n  found: float32 \[3\]"
    ):
        write_safetensors(tmp_path / "x", [("z", ARRAYS["z"])], [np.zeros(3, np.float32)])
    assert not (tmp_path / "x").exists()


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", list(ARRAYS.items()), ARRAYS.values())
    with (tmp_path / "x").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="is too long"):
        open_safetensors(tmp_path / "x")
