"""Host functions get arrays where they lie, raise in the caller, and refuse an API they do not know."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend
from pallas_kernels.cpu import xla_c_api
from pallas_kernels.cpu.ffi import HostFunction, raise_interrupts
from pallas_kernels.mlp.op import OP

seen = {}


def _double(constant, x, y, *, factor, name):
    seen.update(address=constant.ctypes.data, writeable=constant.flags.writeable, static=(factor, name))
    seen["dtypes"] = (constant.dtype, x.dtype)
    np.multiply(x, np.asarray(factor, x.dtype), out=y)


def _fail(x, y):
    raise ValueError("row 3 is torn")


double, fail = HostFunction(_double), HostFunction(_fail)


def test_a_host_functions_arguments_are_not_copied():
    constant, x = jnp.arange(5000, dtype=jnp.uint8), jnp.ones((2, 3))
    run = jax.jit(lambda c, x: double(jax.ShapeDtypeStruct(x.shape, x.dtype), c, x, factor=2, name="twice"))
    assert (run(constant, x) == 2).all()
    assert seen["address"] == constant.unsafe_buffer_pointer()
    assert not seen["writeable"]
    assert seen["static"] == (2, "twice")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint16", "uint32", "int8", "bool"])
def test_a_host_function_gets_arrays_of_every_dtype(dtype):
    x = jnp.ones((3,), dtype)
    found = double(jax.ShapeDtypeStruct((3,), dtype), x, x, factor=1, name="")
    assert seen["dtypes"] == (dtype, dtype)
    assert (found == x).all()


def test_a_host_function_takes_empty_arrays_and_vmap():
    empty = jnp.zeros((0, 4))
    assert double(jax.ShapeDtypeStruct((0, 4), jnp.float32), empty, empty, factor=2, name="").shape == (0, 4)
    x = jnp.arange(6.0).reshape(3, 2)
    run = jax.vmap(
        lambda x: double(jax.ShapeDtypeStruct((2,), jnp.float32), jnp.zeros(1), x, factor=3, name="")
    )
    assert (run(x) == 3 * x).all()


def test_a_host_function_may_have_two_results():
    def split(x, low, high):
        low[...], high[...] = x[:2], x[2:]

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    low, high = HostFunction(split)((shape, shape), jnp.arange(4.0))
    assert low.tolist() == [0, 1]
    assert high.tolist() == [2, 3]


def test_a_host_functions_errors_reach_the_caller():
    x = jnp.ones(2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="_fail: ValueError: row 3 is torn"):
        jax.block_until_ready(fail(jax.ShapeDtypeStruct((2,), jnp.float32), x))


@pytest.fixture
def header(monkeypatch, tmp_path):
    """Write the header of a jaxlib with another version of the interface; without a call there is none."""
    xla_c_api.installed_version.cache_clear()
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    path = tmp_path / "xla/ffi/api/c_api.h"
    path.parent.mkdir(parents=True)
    yield lambda major, minor: path.write_text(
        f"#define XLA_FFI_API_MAJOR {major}\n\n#define XLA_FFI_API_MINOR {minor}\n"
    )
    xla_c_api.installed_version.cache_clear()


def test_the_installed_jaxlib_has_a_known_version_of_the_interface():
    assert xla_c_api.version_refusal() is None


@pytest.mark.parametrize("version", [(0, 2), (0, 6), (1, 0), (1, 4)])
def test_another_version_of_the_interface_is_refused_with_expected_and_found(header, version):
    header(*version)
    found = f"expected version 0.3 to 0.5 of XLA's FFI C API, found {version[0]}.{version[1]} in jaxlib "
    assert backend.refusal(OP, "cpu").startswith(found)
    with pytest.raises(NotImplementedError, match=f"backend 'cpu' cannot run: {found}.*; install 'jax>="):
        backend.choose_backend(OP, "cpu")
    with pytest.raises(NotImplementedError, match=f"_fail cannot be called from jitted code: {found}"):
        HostFunction(_fail)(jax.ShapeDtypeStruct((2,), jnp.float32), jnp.ones(2))


def test_a_jaxlib_without_a_version_of_the_interface_is_refused(header):
    assert "found none ([Errno 2] No such file" in xla_c_api.version_refusal()
    pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").write_text("#pragma once\n")
    assert "c_api.h does not define XLA_FFI_API_MAJOR" in xla_c_api.version_refusal()


def test_xla_refuses_a_version_that_it_does_not_support(monkeypatch):
    """The version that a handler says it is written for is its own, not XLA's, so that XLA can refuse it."""
    monkeypatch.setattr(xla_c_api, "OLDEST_VERSION", (0, 99))
    monkeypatch.setattr(xla_c_api, "version_refusal", lambda: None)
    jax.devices()  # handlers are registered when there is a backend
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"API version \(0.99\) is incompatible with"):
        HostFunction(lambda x, y: None)(jax.ShapeDtypeStruct((2,), jnp.float32), jnp.ones(2))


def interrupted(x, y) -> None:
    raise KeyboardInterrupt("stop")


def test_an_interrupt_in_a_host_function_can_be_raised_as_itself():
    call = jax.jit(lambda x: HostFunction(interrupted)(jax.ShapeDtypeStruct((3,), jnp.float32), x))
    with pytest.raises(KeyboardInterrupt, match="stop"), raise_interrupts():
        call(jnp.zeros(3)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyboardInterrupt: stop"):
        call(jnp.zeros(3)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), raise_interrupts():
        raise jax.errors.JaxRuntimeError("another error, later")
