"""Runs jax-triton kernels on a CPU in Triton's interpreter: real loads and stores on NumPy's memory."""

import importlib
import os
import types

import jax
import numpy as np
import pytest

MARGIN = 4096  # bytes on either side of an array: NaN of any type, found unchanged after the kernel


def interpreted_kernels() -> types.ModuleType:
    """Import the product by jax-triton, interpreted by Triton; skip the test where it is not installed."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported first, which must not have happened
    pytest.importorskip("triton", reason="triton is not installed: make test-newest runs these")
    pytest.importorskip("jax_triton", reason="jax-triton cannot be imported", exc_type=ImportError)
    return importlib.import_module("pallas_kernels.matmul.jax_triton")


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a copy between margins, the bytes of all of it)."""
    around = np.full(array.nbytes + 2 * MARGIN, 0xFF, np.uint8)
    copy = around[MARGIN : MARGIN + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy, around


class Tensor:
    """As much of a torch.Tensor as the interpreter asks for, over a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def new_empty(self, *_: object, **__: object) -> "Tensor":
        return Tensor(self.array[:0])

    def set_(self, storage: "Tensor", *_: object) -> None:
        self.array = storage.array

    def copy_(self, other: "Tensor") -> None:
        assert other.array is self.array

    storage_offset = size = stride = lambda self: None


def triton_call(*arrays, kernel, grid, num_warps, num_stages, out_type=None, out_shape=None, **static):
    """Interpret a `jax_triton.triton_call`; elements that the kernel does not write are NaN."""
    del num_warps, num_stages
    result = out_type or out_shape

    def run(*arrays):
        out = np.full(result.shape, np.nan, result.dtype)
        copies, memory = zip(*map(guarded, (*map(np.asarray, arrays), out)), strict=True)
        kernel[grid](*map(Tensor, copies), **static)
        for around in memory:
            assert (around[:MARGIN] == 0xFF).all() and (around[-MARGIN:] == 0xFF).all(), kernel
        return copies[-1]

    return jax.pure_callback(run, result, *arrays)
