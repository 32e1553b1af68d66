"""Calls a Python function from jitted code on a CPU, on the arrays where they lie.

`jax.pure_callback` copies every argument on every call (82 ms for 64 MB on a two-core machine), which packed
experts cannot afford. XLA's foreign function interface hands over pointers instead; the structures below are
those of its stable C interface (`xla/ffi/api/c_api.h`, in jaxlib's include folder), read with ctypes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

_METADATA_EXTENSION = 1
_SCALAR_ATTRIBUTE, _STRING_ATTRIBUTE = 3, 4
_INTERNAL_ERROR = 13
_DTYPES = {
    1: np.bool_,
    2: np.int8,
    4: np.int32,
    5: np.int64,
    6: np.uint8,
    7: np.uint16,
    8: np.uint32,
    11: np.float32,
    16: ml_dtypes.bfloat16,
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

    def __str__(self) -> str:
        return ctypes.string_at(self.start, self.size).decode()


class _Scalar(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("value", ctypes.c_void_p))


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


class _Memory:
    """NumPy's array interface over memory that XLA owns."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str, *, readonly: bool):
        self.__array_interface__ = {
            "data": (address, readonly),
            "shape": shape,
            "typestr": typestr,
            "version": 3,
        }


def _view(buffer: _Buffer, *, readonly: bool) -> np.ndarray:
    dtype, shape = np.dtype(_DTYPES[buffer.dtype]), tuple(buffer.dims[: buffer.rank])
    if 0 in shape:
        return np.empty(shape, dtype)
    memory = _Memory(buffer.data, shape, f"|u{dtype.itemsize}", readonly=readonly)
    return np.asarray(memory).view(dtype)


def _views(buffers: _Buffers, *, readonly: bool) -> list[np.ndarray]:
    return [_view(buffers.values[i].contents, readonly=readonly) for i in range(buffers.size)]


def _attribute(kind: int, value: int) -> int | str:
    if kind == _STRING_ATTRIBUTE:
        return str(_Span.from_address(value))
    assert kind == _SCALAR_ATTRIBUTE, kind
    scalar = _Scalar.from_address(value)
    dtype = np.dtype(_DTYPES[scalar.dtype])
    return int(np.frombuffer(ctypes.string_at(scalar.value, dtype.itemsize), dtype)[0])


def _keywords(attributes: _Attributes) -> dict[str, int | str]:
    return {
        str(attributes.names[i].contents): _attribute(attributes.types[i], attributes.values[i])
        for i in range(attributes.size)
    }


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
        attributes = {k: np.int64(v) if isinstance(v, int) else v for k, v in static.items()}
        return jax.ffi.ffi_call(self.target, results, vmap_method="sequential")(*arguments, **attributes)


_registered: list[Any] = []  # XLA keeps the pointers as long as the process lives
