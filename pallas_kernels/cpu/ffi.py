"""Calls from jitted code on a CPU to Python functions, on the arrays where they lie.

`jax.pure_callback` copies every argument on every call (82 ms for 64 MB on a two-core machine), which packed
experts cannot afford. XLA's foreign function interface hands over pointers instead, in the structures of
`xla_c_api`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.cpu import xla_c_api as c_api


@dataclasses.dataclass(frozen=True)
class HostFunction:
    """A Python function that jitted code calls on a CPU as `function(*arguments, *results, **static)`.

    The arguments are read-only NumPy views of XLA's buffers and the results writable ones: nothing is copied.
    Both are XLA's again when the function returns, so it must keep none of them. XLA may call it from any of
    its threads, from several at once; it holds the interpreter's lock as all Python does. `static` are
    integers and strings, fixed when traced. An exception in the function
    is raised as `jax.errors.JaxRuntimeError` when a result is waited for.

    Attributes:
        function: the function, whose name must be unique in its module.
    """

    function: Callable[..., None]

    @functools.cached_property
    def target(self) -> str:
        """The name that it has with XLA, where it is registered on first use until the process ends.

        Raises:
            NotImplementedError: the installed jaxlib has a version of the API that this is not written for.
        """
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        if reason := c_api.version_refusal():
            raise NotImplementedError(f"{name} cannot be called from jitted code: {reason}")
        handler = _handler(self.function)
        _registered.append(handler)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
        return name

    def __call__(
        self,
        results: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
        *arguments: Any,
        **static: int | str,
    ) -> Any:
        """Return arrays of the shapes and dtypes `results` that the function has filled.

        Under vmap it is called for one element after another.

        Raises:
            NotImplementedError: see `target`.
        """
        call = jax.ffi.ffi_call(self.target, results, vmap_method="sequential")
        return call(*arguments, static=json.dumps(static, sort_keys=True))


@contextlib.contextmanager
def raise_interrupts() -> Iterator[None]:
    """Raise a Ctrl-C that came while a function ran for XLA, in place of the `JaxRuntimeError` it becomes."""
    _interrupts.clear()
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if _interrupts:
            raise _interrupts.pop() from None
        raise


_interrupts: list[KeyboardInterrupt] = []
_registered: list[Any] = []  # XLA keeps the handlers' addresses until the process ends


def _handler(function: Callable[..., None]) -> Any:
    """Return the C function that XLA calls: once to learn its version of the API, then to execute."""

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension and frame.extension.contents.type == c_api.METADATA_EXTENSION:
            # The version that it is written for: XLA refuses it where it no longer supports that one.
            version = frame.extension.contents.metadata.contents.version
            version.major, version.minor = c_api.OLDEST_VERSION
            return None
        try:
            arguments = _views(frame.arguments, writable=False)
            results = _views(frame.results, writable=True)
            function(*arguments, *results, **_static(frame.attributes))
        except BaseException as error:  # nothing may unwind through C; XLA raises it again
            if isinstance(error, KeyboardInterrupt):
                _interrupts.append(error)
            message = f"{getattr(function, '__qualname__', function)}: {type(error).__name__}: {error}"
            details = c_api.Error(ctypes.sizeof(c_api.Error), None, message.encode(), c_api.INTERNAL_ERROR)
            return frame.api.contents.create_error(ctypes.byref(details))
        return None

    return c_api.Handler(handle)


def _views(buffers: c_api.Buffers, *, writable: bool) -> list[np.ndarray]:
    return [_view(buffers.values[i].contents, writable=writable) for i in range(buffers.size)]


def _view(buffer: c_api.Buffer, *, writable: bool) -> np.ndarray:
    dtype, shape = c_api.DTYPES[buffer.dtype], tuple(buffer.dims[: buffer.rank])
    if 0 in shape:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(buffer.data)
    view = np.ndarray(shape, dtype, memory)
    view.flags.writeable = writable
    return view


def _static(attributes: c_api.Attributes) -> dict[str, Any]:
    """Return the keyword arguments, which the call's only attribute holds as JSON."""
    return _parsed(c_api.Span.from_address(attributes.values[0]).copy())


@functools.lru_cache
def _parsed(text: bytes) -> dict[str, Any]:
    return json.loads(text)
