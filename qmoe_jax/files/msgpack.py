"""Flax's msgpack of a parameter tree: nested dicts whose leaves are arrays or plain values.

Memory: the file, and the arrays of it that Flax cut into chunks (those above 1 GiB) a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flax import serialization

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error

Tree = dict[str, Any]


def decode_tree(data: bytes, path: object) -> Tree:
    """Return the tree in `data`, with NumPy arrays that are views of it; arrays cut into chunks are joined.

    Raises:
        CheckpointError: the bytes are cut short, damaged, or not the msgpack of a dict; `path` is named.
    """
    try:
        tree = serialization.msgpack_restore(data)
    except Exception as error:  # whatever damaged bytes lead Flax to
        raise foreign_error(path, data) or CheckpointError(
            "is not readable msgpack: cut short, damaged, or another format",
            path=path,
            expected="the msgpack of a Flax tree, as T5X writes it",
            found=f"{len(data):,} bytes; {error or type(error).__name__}",
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError("does not hold a tree", path=path, expected="a dict", found=type(tree).__name__)
    return tree


def encode_tree(tree: Tree) -> bytes:
    """Return the msgpack of a tree of dicts, arrays, strings and numbers, its keys in their order."""
    # Otherwise Flax copies the tree, which sorts the keys; T5X's own order is that of its state.
    return serialization.msgpack_serialize(tree, in_place=True)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their paths, `a/b/c`. The tensorstore spec of an array is one leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and not is_array_spec(value):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def is_array_spec(value: object) -> bool:
    """Return whether a leaf is the tensorstore spec of an array stored elsewhere."""
    return isinstance(value, dict) and value.keys() >= {"driver", "kvstore", "metadata"}
