"""Calls a Python function from jitted code on a CPU, on the arrays where they lie.

`jax.pure_callback` copies every argument on every call (82 ms for 64 MB on a two-core machine), which packed
experts cannot afford. XLA's foreign function interface hands over pointers instead; the structures below are
those of its stable C interface (`xla/ffi/api/c_api.h`, in jaxlib's include folder), read with ctypes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

_METADATA_EXTENSION = 1
_INTERNAL_ERROR = 13
_DTYPES = {
    1: np.dtype(np.bool_),
    2: np.dtype(np.int8),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.uint8),
    7: np.dtype(np.uint16),
    8: np.dtype(np.uint32),
    11: np.dtype(np.float32),
    16: np.dtype(ml_dtypes.bfloat16),
}


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    )


class _Error(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Error))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("values", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def bytes(self) -> bytes:
        return ctypes.string_at(self.start, self.size)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.POINTER(ctypes.c_int)),
        ("names", ctypes.POINTER(ctypes.POINTER(_Span))),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))


def _view(buffer: _Buffer, *, readonly: bool) -> np.ndarray:
    dtype, shape = _DTYPES[buffer.dtype], tuple(buffer.dims[: buffer.rank])
    if 0 in shape:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(buffer.data)
    view = np.ndarray(shape, dtype, memory)
    view.flags.writeable = not readonly
    return view


def _views(buffers: _Buffers, *, readonly: bool) -> list[np.ndarray]:
    return [_view(buffers.values[i].contents, readonly=readonly) for i in range(buffers.size)]


def _keywords(attributes: _Attributes) -> dict[str, Any]:
    return _parsed(_Span.from_address(attributes.values[0]).bytes())


@functools.lru_cache
def _parsed(text: bytes) -> dict[str, Any]:
    return json.loads(text)


def _handler(function: Callable[..., None]) -> Any:
    """The C function that XLA calls: once to learn which interface it speaks, then for each execution."""

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        api = frame.api.contents
        if frame.extension and frame.extension.contents.type == _METADATA_EXTENSION:
            metadata = frame.extension.contents.metadata.contents
            metadata.version.major, metadata.version.minor = api.version.major, api.version.minor
            return None
        try:
            arguments = _views(frame.arguments, readonly=True)
            results = _views(frame.results, readonly=False)
            function(*arguments, *results, **_keywords(frame.attributes))
        except BaseException as error:  # nothing may unwind through C; XLA raises it again
            message = f"{getattr(function, '__qualname__', function)}: {type(error).__name__}: {error}"
            details = _Error(ctypes.sizeof(_Error), None, message.encode(), _INTERNAL_ERROR)
            return api.create_error(ctypes.byref(details))
        return None

    return _Handler(handle)


@dataclasses.dataclass(frozen=True)
class HostFunction:
    """A Python function that jitted code can call on a CPU: `function(*arguments, *results, **static)` in
    place.

    The arguments are read-only NumPy views of XLA's buffers and the results writable ones; both are XLA's
    again when the function returns. `static` are integers and strings, fixed when traced. What the function
    raises, jax raises when the result is waited for.
    """

    function: Callable[..., None]

    @functools.cached_property
    def target(self) -> str:
        """The name it is registered under with XLA, on first use and for good."""
        name = f"{self.function.__module__}.{self.function.__qualname__}"
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
        """Arrays of the shapes `results`, filled by the function; under vmap it runs element by element."""
        call = jax.ffi.ffi_call(self.target, results, vmap_method="sequential")
        return call(*arguments, static=json.dumps(static, sort_keys=True))


_registered: list[Any] = []  # XLA keeps the pointers as long as the process lives
