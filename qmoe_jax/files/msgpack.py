"""Flax's msgpack of a tree: nested dicts whose leaves are arrays (extension types) or plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from qmoe_jax.files.errors import CheckpointError

# Flax's extension types (flax.serialization): an array, a complex number, a NumPy scalar.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"

Tree = dict[str, Any]


def decode_tree(data: bytes, path: object) -> Tree:
    """The tree in `data`, arrays as NumPy's (views of the decoded bytes), chunked arrays joined.

    Raises `CheckpointError` if the bytes are cut short or no msgpack dict.
    """
    try:
        tree = msgpack.unpackb(data, ext_hook=_decode_extension, strict_map_key=False, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CheckpointError(
            "no readable msgpack: cut short, damaged, or another format",
            path=path,
            expected="the msgpack of a Flax tree, as T5X writes it",
            found=f"{len(data):,} bytes; {error or type(error).__name__}",
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError("no tree", path=path, expected="a dict", found=type(tree).__name__)
    return tree


def encode_tree(tree: Mapping[str, Any]) -> bytes:
    """The msgpack of a tree of dicts, arrays (smaller than 2^30 bytes), strings and numbers."""
    return msgpack.packb(tree, default=_encode_array, use_bin_type=True, strict_types=True)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their paths, `a/b/c`. A chunked array or a tensorstore spec is one leaf."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value.get(_CHUNKED):
            yield path, _join_chunks(value)
        elif isinstance(value, dict) and not is_array_spec(value):
            yield from leaves(value, f"{path}/")
        else:
            yield path, value


def is_array_spec(value: object) -> bool:
    """Whether a leaf is the tensorstore spec of an array stored elsewhere."""
    return isinstance(value, dict) and value.keys() >= {"driver", "kvstore", "metadata"}


def dtype_of(name: str) -> np.dtype:
    """The dtype of a NumPy name (`float32`), a zarr string (`<f4`), or `bfloat16`."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _decode_extension(code: int, data: bytes) -> object:
    if code in (_ARRAY, _SCALAR):
        shape, dtype, payload = msgpack.unpackb(data, raw=False)
        array = np.frombuffer(payload, dtype_of(dtype))
        if array.size != math.prod(shape):
            raise ValueError(f"an array of shape {shape} has {array.size} values")
        return array.reshape(shape)
    if code == _COMPLEX:
        return complex(*msgpack.unpackb(data))
    raise ValueError(f"unknown extension type {code}")


def _encode_array(value: object) -> msgpack.ExtType:
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return msgpack.ExtType(_ARRAY, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
    raise TypeError(f"{type(value).__name__} has no place in a checkpoint's tree")


def _join_chunks(leaf: Mapping[str, Any]) -> np.ndarray:
    shape, chunks = ([leaf[field][str(i)] for i in range(len(leaf[field]))] for field in ("shape", "chunks"))
    return np.concatenate(chunks).reshape(shape)
