"""Safetensors files: the header, lazy tensors of a file, and a writer that streams.

A file is eight bytes (the length of the header, little-endian), the header (JSON: dtype, shape and byte range
of each tensor, beside a `__metadata__` of strings), and the bytes, without a gap. The `safetensors` package
sorts tensors by dtype and name; here they lie in the order given. Memory: the header while it
is parsed, and the rows that are read or the one tensor that is written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from qmoe_jax.files.durable import FileRecord, write_durably
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.foreign import foreign_error
from qmoe_jax.files.reading import parse_json, wrong_size
from qmoe_jax.files.store import File
from qmoe_jax.files.tensor import LazyTensor

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGNMENT = 16
"""The data begin at a multiple of this many bytes, as each expert of an artifact does, so that every element
is aligned where it lies. The header is padded with spaces, as the format allows."""

_WRITERS_ALIGNMENT = 8
"""Bytes that the format's own writer pads to, so that checkpoints for other programs look like its files."""

MAX_HEADER = 100_000_000
"""The longest header that the format allows, in bytes; a larger number means another file format."""

_MOST_AXES = 32
_MOST_VALUES = 2**40
"""Sizes beyond any tensor's, which NumPy refuses in other ways."""


class ShapeDtype(Protocol):
    """Anything with a shape and a dtype: an array, a `Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements."""
        ...


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header.

    Attributes:
        name: its key.
        dtype, shape: of the tensor, row-major.
        begin: offset of its first byte, counted from the end of the header.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """Offset behind its last byte."""
        return self.begin + nbytes(self)


@dataclasses.dataclass(frozen=True)
class Header:
    """A checked header: the tensors in the order of their bytes, the metadata, and the offset of the data."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_begin: int


def nbytes(tensor: ShapeDtype) -> int:
    """Return the size of a tensor's data in bytes."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def render_header(
    tensors: Sequence[tuple[str, ShapeDtype]], metadata: Mapping[str, str], *, alignment: int = ALIGNMENT
) -> bytes:
    """Return the header of a file whose tensors lie in the order given, padded to `alignment` bytes."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, tensor in tensors:
        begin, position = position, position + nbytes(tensor)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, position],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, ShapeDtype]], arrays: Iterable[np.ndarray]
) -> FileRecord:
    """Write a file of named tensors, whose values `arrays` yields in the same order; it is whole or absent.

    Memory: one array.

    Raises:
        CheckpointError: an array has another shape or dtype than announced, or the file cannot be written.
    """
    header = render_header(tensors, {"format": "pt"}, alignment=_WRITERS_ALIGNMENT)
    return write_durably(path, itertools.chain([header], _chunks(path, tensors, arrays)))


def _chunks(
    path: Path, tensors: Sequence[tuple[str, ShapeDtype]], arrays: Iterable[np.ndarray]
) -> Iterator[memoryview]:
    for (name, tensor), array in zip(tensors, arrays, strict=True):
        if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                "a tensor differs from its entry in the header",
                path=path,
                key=name,
                expected=f"{tensor.dtype} {list(tensor.shape)}",
                found=f"{array.dtype} {list(array.shape)}",
            )
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a file by name; a read reads one range. Raises as `read_header` does."""
    return lazy_tensors(path, read_header(path))


def lazy_tensors(file: Path | File, header: Header) -> dict[str, LazyTensor]:
    """Return the tensors of a file by name, in the order of their bytes, by its header."""
    file = File.at(file) if isinstance(file, Path) else file
    return {entry.name: _tensor(file, entry, header.data_begin) for entry in header.tensors}


def _tensor(file: File, entry: TensorEntry, data_begin: int) -> LazyTensor:
    row_shape = entry.shape[1:]
    row_bytes = math.prod(row_shape) * entry.dtype.itemsize

    def read(rows: slice) -> np.ndarray:
        array = np.empty((rows.stop - rows.start, *row_shape) if entry.shape else (), entry.dtype)
        skipped = rows.start * row_bytes if entry.shape else 0
        return file.read_array(data_begin + entry.begin + skipped, array, entry.name)

    return LazyTensor(entry.shape, entry.dtype, read)


def read_header(file: Path | File) -> Header:
    """Read and check the header of a file, and check that the file has exactly the bytes that it promises.

    Raises:
        CheckpointError: the file is missing, cut short or too long, its header is damaged or leaves a gap, or
            a dtype is unknown.
    """
    file = File.at(file) if isinstance(file, Path) else file
    path = file.path
    length = int.from_bytes(file.read_exactly(0, 8), "little")
    if length > MAX_HEADER:
        raise foreign_error(path) or CheckpointError(
            "is not a safetensors file",
            path=path,
            expected=f"a header of at most {MAX_HEADER:,} bytes",
            found=f"one of {length:,} bytes",
        )
    try:
        parsed = parse_json(bytes(file.read_exactly(8, length)))
    except ValueError as error:
        raise CheckpointError("the header is not valid JSON", path=path, found=error) from error
    metadata = parsed.pop("__metadata__", {}) if isinstance(parsed, dict) else None
    if not isinstance(metadata, dict):
        raise CheckpointError(
            "the header is not an object of tensors", path=path, found=str(parsed)[:100] or "nothing"
        )
    entries = (_parse_entry(path, name, fields) for name, fields in parsed.items())
    tensors = tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end)))
    _require_no_gap(path, tensors)
    expected = 8 + length + (tensors[-1].end if tensors else 0)
    if (found := file.size(expected) or 0) != expected:
        raise wrong_size(path, expected=expected, found=found)
    return Header(tensors, metadata, 8 + length)


def _parse_entry(path: Path | str, name: str, fields: Any) -> TensorEntry:
    try:
        begin, end = map(_whole_number, fields["data_offsets"])
        dtype, shape = str(fields["dtype"]), tuple(map(_whole_number, fields["shape"]))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            "a damaged entry in the header",
            path=path,
            key=name,
            expected="dtype, shape, data_offsets",
            found=fields,
        ) from error
    if dtype not in DTYPES:
        raise CheckpointError(
            "an unknown dtype", path=path, key=name, expected=", ".join(DTYPES), found=dtype
        )
    entry = TensorEntry(name, DTYPES[dtype], shape, begin)
    sizes = math.prod(max(1, size) for size in shape)  # NumPy refuses others, empty or not
    if min((*shape, begin)) < 0 or entry.end != end or len(shape) > _MOST_AXES or sizes > _MOST_VALUES:
        raise CheckpointError(
            "the offsets do not fit the shape",
            path=path,
            key=name,
            expected=f"{nbytes(entry):,} bytes for {dtype} {list(shape)}",
            found=f"bytes {begin:,} to {end:,}",
        )
    return entry


def _whole_number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, found {type(value).__name__}")
    return value


def _require_no_gap(path: Path | str, tensors: Sequence[TensorEntry]) -> None:
    position = 0
    for entry in tensors:
        if entry.begin != position:
            raise CheckpointError(
                "tensors overlap or leave a gap",
                path=path,
                key=entry.name,
                expected=f"data at byte {position}",
                found=f"at byte {entry.begin}",
            )
        position = entry.end
