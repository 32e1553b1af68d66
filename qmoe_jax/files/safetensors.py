"""One safetensors file, read lazily: the header when it is opened, a tensor's bytes when it is asked for.

Files are read with `pread`, not mapped: a file that was cut short gives an error, not a bus error.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.files.errors import CheckpointError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
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
# The format's own bound on the header; a larger one means another file format.
_LARGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A dense row-major tensor in a file, `offset` bytes from its start."""

    file: Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice) -> np.ndarray:
        """The rows, in one read of their bytes. Raises `CheckpointError` if the file has become shorter."""
        shape = (rows.stop - rows.start, *self.shape[1:]) if self.shape else ()
        array = np.empty(shape, self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        read_into(self.file, self.offset + (rows.start * row_bytes if self.shape else 0), array, self.key)
        return array


def read_into(file: Path, offset: int, array: np.ndarray, key: str) -> None:
    """Fills a contiguous array with the file's bytes from `offset` on.

    Raises `CheckpointError` if the file ends before, or cannot be opened.
    """
    data = array.reshape(-1).view(np.uint8).data
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < len(data) and (count := stream.readinto(data[done:])):
                done += count
    except OSError as error:
        raise CheckpointError("cannot be read", path=file, key=key, found=error.strerror) from error
    if done < len(data):
        raise CheckpointError(
            "the file is cut short",
            path=file,
            key=key,
            expected=f"{len(data):,} bytes from byte {offset:,}",
            found=f"{done:,}",
            remedy="copy the file again",
        )


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, after a check that the file is as long as its header says.

    Raises:
        CheckpointError: no safetensors file, a damaged header, an unknown dtype, or a file that was cut
            short.
    """
    size = file.stat().st_size
    header, start = _read_header(file, size)
    tensors = {
        key: _tensor(file, key, entry, start) for key, entry in header.items() if key != "__metadata__"
    }
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end > size:
        raise CheckpointError(
            "the file is cut short",
            path=file,
            key=max(tensors, key=lambda key: tensors[key].offset),
            expected=f"{end:,} bytes",
            found=f"{size:,}",
            remedy="copy the file again",
        )
    return tensors


def _read_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise CheckpointError(
                "no safetensors file, or one cut short in its header",
                path=file,
                expected=f"a header of {length:,} bytes",
                found=f"a file of {size:,} bytes",
            )
        data = stream.read(length)
    try:
        header = json.loads(data)
    except ValueError as error:
        raise CheckpointError("the header is no JSON", path=file, found=error) from error
    if not isinstance(header, dict):
        raise CheckpointError("the header is no JSON object", path=file, found=type(header).__name__)
    return header, 8 + length


def _tensor(file: Path, key: str, entry: Any, start: int) -> StoredTensor:
    try:
        begin, end = entry["data_offsets"]
        name, shape = entry["dtype"], tuple(map(int, entry["shape"]))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            "a damaged entry in the header",
            path=file,
            key=key,
            expected="dtype, shape, data_offsets",
            found=entry,
        ) from error
    if name not in DTYPES:
        raise CheckpointError("an unknown dtype", path=file, key=key, expected=", ".join(DTYPES), found=name)
    tensor = StoredTensor(file, key, DTYPES[name], shape, start + begin)
    if min((*shape, begin), default=0) < 0 or end - begin != tensor.nbytes:
        raise CheckpointError(
            "the offsets do not fit the shape",
            path=file,
            key=key,
            expected=f"{tensor.nbytes:,} bytes for {name} {list(shape)}",
            found=f"bytes {begin:,} to {end:,}",
        )
    return tensor
