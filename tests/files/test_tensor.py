"""Lazy tensors made of others read what NumPy gives for the whole array."""

import numpy as np
import pytest

from qmoe_jax.files.tensor import LazyTensor, in_memory, layer, read_all, scaled, stacked, transposed

CUBE = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
CASES = {
    "in_memory": (in_memory(CUBE), CUBE),
    "transposed": (transposed(in_memory(CUBE[0])), CUBE[0].T),
    "stacked": (stacked([in_memory(matrix) for matrix in CUBE]), CUBE),
    "layer of axis 0": (layer(in_memory(CUBE), 0, 1), CUBE[1]),
    "layer of axis 1": (layer(in_memory(CUBE), 1, 2), CUBE[:, 2]),
    "scaled": (scaled(in_memory(CUBE), 0.1), CUBE.astype(np.float32) * np.float32(0.1)),
}


@pytest.mark.parametrize(("tensor", "want"), CASES.values(), ids=CASES)
def test_a_lazy_tensor_reads_ranges_of_the_whole(tensor: LazyTensor, want: np.ndarray) -> None:
    assert (tensor.shape, tensor.dtype) == (want.shape, want.dtype)
    for start in range(len(want)):
        for stop in range(start, len(want) + 1):
            got = tensor.read(slice(start, stop))
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want[start:stop])


@pytest.mark.parametrize("name", CASES)
def test_changing_what_was_read_does_not_change_the_tensor(name: str) -> None:
    tensor, want = CASES[name]
    want = want.copy()
    read_all(tensor)[:] = 0
    np.testing.assert_array_equal(read_all(tensor), want)


def test_a_scalar_is_read_whole() -> None:
    assert read_all(in_memory(np.array(3))) == 3
