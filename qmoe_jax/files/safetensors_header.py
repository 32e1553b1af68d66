"""The header of a safetensors file, written and read here so that the order of the bytes is ours.

A file is eight bytes (the length of the header, little-endian), the header (JSON: for each tensor its dtype,
shape and the range of its bytes, beside a `__metadata__` of strings), and the bytes, without a gap. The
format's own writer sorts tensors by dtype and name; here they lie in the order given.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qmoe_jax.files.durable import read_exactly, truncated
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.safetensors import DTYPES

ALIGNMENT = 16
"""The data begin at a multiple of this (in bytes): the header is padded with spaces, as the format allows."""

MAX_HEADER = 100_000_000
"""The longest header that the format allows, in bytes."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor: its name, dtype, shape, and where its bytes begin, counted from the end of the header."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """Where the tensor's bytes end."""
        return self.begin + math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    """A header as found: the tensors in the order of their bytes, the metadata, and where the data begin."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_begin: int


def render_header(tensors: Sequence[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file whose tensors lie in the order given."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, array in tensors:
        begin, position = position, position + array.nbytes
        dtype = NAMES[array.dtype]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, position]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> Header:
    """Reads and checks a file's header, and that the file has all of the bytes that it promises.

    Raises:
      CheckpointError: the file is missing or cut short, or this is no safetensors header.
    """
    length = int.from_bytes(read_exactly(path, 0, 8), "little")
    if length > MAX_HEADER:
        raise CheckpointError("is no safetensors file", path=path, found=f"a header of {length} bytes")
    try:
        parsed = json.loads(read_exactly(path, 8, length))
        metadata = parsed.pop("__metadata__", {})
        tensors = tuple(sorted(map(_parse_entry, parsed.items()), key=lambda entry: (entry.begin, entry.end)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("has a damaged safetensors header", path=path, found=repr(error)) from error
    _check_no_gap(path, tensors)
    expected = 8 + length + (tensors[-1].end if tensors else 0)
    if (found := os.stat(path).st_size) < expected:
        raise truncated(path, expected=expected, found=found)
    if found > expected:
        raise CheckpointError("is too long", path=path, expected=f"{expected} bytes", found=f"{found} bytes")
    return Header(tensors, metadata, 8 + length)


def _parse_entry(item: tuple[str, Mapping]) -> TensorEntry:
    name, fields = item
    begin, end = fields["data_offsets"]
    entry = TensorEntry(name, DTYPES[fields["dtype"]], tuple(map(int, fields["shape"])), int(begin))
    if entry.end != end or min(entry.shape, default=0) < 0:
        raise ValueError(f"{name}: {fields}")
    return entry


def _check_no_gap(path: Path, tensors: Sequence[TensorEntry]) -> None:
    position = 0
    for entry in tensors:
        if entry.begin != position:
            raise CheckpointError(
                "has a damaged safetensors header",
                path=path,
                key=entry.name,
                expected=f"data at byte {position}",
                found=f"at byte {entry.begin}",
            )
        position = entry.end
