"""Host calls hand over the arrays where they lie, and what a function raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cpu.ffi import HostFunction

seen = {}


def _double(constant, x, y, *, factor, name):
    seen.update(address=constant.ctypes.data, writeable=constant.flags.writeable, static=(factor, name))
    seen["dtypes"] = (constant.dtype, x.dtype)
    np.multiply(x, np.asarray(factor, x.dtype), out=y)


def _fail(x, y):
    raise ValueError("row 3 is torn")


double, fail = HostFunction(_double), HostFunction(_fail)


def test_arguments_are_not_copied():
    constant, x = jnp.arange(5000, dtype=jnp.uint8), jnp.ones((2, 3))
    run = jax.jit(lambda c, x: double(jax.ShapeDtypeStruct(x.shape, x.dtype), c, x, factor=2, name="twice"))
    assert (run(constant, x) == 2).all()
    assert seen["address"] == constant.unsafe_buffer_pointer()
    assert not seen["writeable"]
    assert seen["static"] == (2, "twice")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint16", "uint32", "int8", "bool"])
def test_dtypes(dtype):
    x = jnp.ones((3,), dtype)
    found = double(jax.ShapeDtypeStruct((3,), dtype), x, x, factor=1, name="")
    assert seen["dtypes"] == (dtype, dtype)
    assert (found == x).all()


def test_empty_arrays_and_vmap():
    empty = jnp.zeros((0, 4))
    assert double(jax.ShapeDtypeStruct((0, 4), jnp.float32), empty, empty, factor=2, name="").shape == (0, 4)
    x = jnp.arange(6.0).reshape(3, 2)
    run = jax.vmap(
        lambda x: double(jax.ShapeDtypeStruct((2,), jnp.float32), jnp.zeros(1), x, factor=3, name="")
    )
    assert (run(x) == 3 * x).all()


def test_two_results():
    def split(x, low, high):
        low[...], high[...] = x[:2], x[2:]

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    low, high = HostFunction(split)((shape, shape), jnp.arange(4.0))
    assert low.tolist() == [0, 1]
    assert high.tolist() == [2, 3]


def test_errors_reach_the_caller():
    x = jnp.ones(2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="_fail: ValueError: row 3 is torn"):
        jax.block_until_ready(fail(jax.ShapeDtypeStruct((2,), jnp.float32), x))
