"""XLA's foreign function interface as ctypes structures, and the versions of it that they are right for.

The interface is the stable C API of `xla/ffi/api/c_api.h`, in jaxlib's include folder. Fields at the end of a
structure that are not used here are left out, as the API provides for by `struct_size`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import pathlib
import re

import jax
import ml_dtypes
import numpy as np

# (major, minor). The structures below were compared with the headers of jaxlib 0.10.2 (0.3), 0.11.2 (0.4) and
# 0.12.0.1 (0.5), which lay them out alike.
OLDEST_VERSION, NEWEST_VERSION = (0, 3), (0, 5)

METADATA_EXTENSION = 1
INTERNAL_ERROR = 13
DTYPES = {
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


@functools.cache
def installed_version() -> tuple[int, int]:
    """Return (major, minor) of the API that the installed jaxlib implements, from its header.

    Raises:
        OSError: the header is missing.
        ValueError: the header does not define a version.
    """
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", header.read_text()))
    if len(found) != 2:
        raise ValueError(f"{header} does not define XLA_FFI_API_MAJOR and XLA_FFI_API_MINOR")
    return int(found["MAJOR"]), int(found["MINOR"])


def version_refusal() -> str | None:
    """Return why the structures cannot be trusted with the installed jaxlib, or None where they can.

    The version is that of the header: XLA gives its own in one of the structures, which could not be trusted
    yet.
    """
    expected = f"expected version {_dotted(OLDEST_VERSION)} to {_dotted(NEWEST_VERSION)} of XLA's FFI C API"
    try:
        version = installed_version()
        if OLDEST_VERSION <= version <= NEWEST_VERSION:
            return None
        found = f"found {_dotted(version)}"
    except (OSError, ValueError) as error:
        found = f"found none ({error})"
    jaxlib = importlib.metadata.version("jaxlib")
    return f"{expected}, {found} in jaxlib {jaxlib}; install 'jax>=0.10.2,<0.13'"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


class Version(ctypes.Structure):
    """`XLA_FFI_Api_Version`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class Metadata(ctypes.Structure):
    """`XLA_FFI_Metadata`."""

    _fields_ = (("struct_size", ctypes.c_size_t), ("version", Version), ("traits", ctypes.c_uint32))


class MetadataExtension(ctypes.Structure):
    """`XLA_FFI_Metadata_Extension`, the base's fields first."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(Metadata)),
    )


class Error(ctypes.Structure):
    """`XLA_FFI_Error_Create_Args`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class Api(ctypes.Structure):
    """`XLA_FFI_Api`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("version", Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Error))),
    )


class Buffer(ctypes.Structure):
    """`XLA_FFI_Buffer`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class Buffers(ctypes.Structure):
    """`XLA_FFI_Args` or `XLA_FFI_Rets`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("values", ctypes.POINTER(ctypes.POINTER(Buffer))),
    )


class Span(ctypes.Structure):
    """`XLA_FFI_ByteSpan`."""

    _fields_ = (("start", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def copy(self) -> bytes:
        """Return its bytes."""
        return ctypes.string_at(self.start, self.size)


class Attributes(ctypes.Structure):
    """`XLA_FFI_Attrs`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.POINTER(ctypes.c_int)),
        ("names", ctypes.POINTER(ctypes.POINTER(Span))),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
    )


class CallFrame(ctypes.Structure):
    """`XLA_FFI_CallFrame`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(MetadataExtension)),
        ("api", ctypes.POINTER(Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    )


Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(CallFrame))
"""The type of a handler: returns no error (None), or one that `Api.create_error` made."""
